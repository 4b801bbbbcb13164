"""A check of a kernel's machine code (SASS of compute capability 9.0) that needs no GPU.

ptxas 12.8, which Triton 3.6 and 3.7 bring along, sometimes takes the address of a tile in shared
memory from a uniform register that nothing has written. The kernel then multiplies by whatever lies
there, now and then the right numbers. Such a register can be seen in the code.
"""

import re
from collections.abc import Iterator

_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*([^;]*);", re.MULTILINE
)
_REGISTER = re.compile(r"\bUR(\d+)")
_PAIRS = re.compile(r"\.(64|WIDE)\b")  # results of two registers


def undefined_registers(sass: str) -> list[str]:
    """The instructions that read a uniform register which no earlier line writes.

    Args:
        sass: What ``nvdisasm -c`` prints of a kernel.
    """
    written: set[int] = set()
    found = []
    for operation, operands in _INSTRUCTION.findall(sass):
        target, _, sources = operands.partition(",")
        match = re.fullmatch(r"\s*UR(\d+)\s*", target)
        if match is None:
            sources = operands
        if set(_reads(operation, sources)) - written:
            found.append(f"{operation} {operands.strip()}")
        if match is not None:
            first = int(match[1])
            written.update(range(first, first + (2 if _PAIRS.search(operation) else 1)))
    return found


def _reads(operation: str, sources: str) -> Iterator[int]:
    """Numbers of the uniform registers that an instruction reads."""
    for before, number in re.findall(r"(.*?)\bgdesc\[UR(\d+)\]", sources):
        # descriptors of both operands, or of the second where the first lies in registers
        first = int(number) + 2 * (len(re.findall(r"\bR\d+", before)) > 1)
        yield from range(first, int(number) + 4)
    for number in re.findall(r"(?<!g)\bdesc\[UR(\d+)\]", sources):
        yield from (int(number), int(number) + 1)
    # a wide product is made of single factors
    width = 2 if operation.startswith("U") and ".64" in operation else 1
    for number in _REGISTER.findall(re.sub(r"\bg?desc\[UR\d+\]", "", sources)):
        yield from range(int(number), int(number) + width)
