"""Reading and writing files: what is written is whole or not there, what is read is not trusted.

`i2am.files.container` is apart, because it imports torch.
"""

from i2am.files.atomic import append, publish, write, write_together
from i2am.files.digests import digests_of, is_listed, sha256_of_file, sha256_of_folder
from i2am.files.folders import (
    MANIFEST,
    OutputRefused,
    check_free,
    check_place,
    fresh_folder,
    inner_folder,
    make_folder,
    refuse_links,
    replaced_folder,
)
from i2am.files.json_files import canonical, parse_json, read_json, readable_json, require
from i2am.files.locks import FolderLock
from i2am.files.regular import FileRejected, FileTooLarge, open_regular, read_bytes

__all__ = [
    "MANIFEST",
    "FileRejected",
    "FileTooLarge",
    "FolderLock",
    "OutputRefused",
    "append",
    "canonical",
    "check_free",
    "check_place",
    "digests_of",
    "fresh_folder",
    "inner_folder",
    "is_listed",
    "make_folder",
    "open_regular",
    "parse_json",
    "publish",
    "read_bytes",
    "read_json",
    "readable_json",
    "refuse_links",
    "replaced_folder",
    "require",
    "sha256_of_file",
    "sha256_of_folder",
    "write",
    "write_together",
]
