"""Every family of models, as a parameter of tests, and what its recording must hold."""

import family_oracle
import pytest
from family_cases import FAMILIES, dits

small_references = dits.small_references
