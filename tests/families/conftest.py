"""Every family of models whole, and what its recording must hold."""

from family_cases import dits

small_references = dits.small_references
