"""Registers that nothing wrote, in machine code as ptxas 12.8 writes it."""

import pytest

from i2am.kernels.fused.machine_code import undefined_registers


def listing(*instructions):
    """Instructions as nvdisasm prints them."""
    lines = [
        f"        /*{16 * at:04x}*/                   {code} ;"
        for at, code in enumerate(instructions)
    ]
    return "\n".join(["\t.section\t.text.owner_pass", *lines])


DESCRIPTORS = (
    "S2UR UR4, SR_CgaCtaId",
    "UMOV UR7, 0x400",
    "ULEA UR7, UR4, UR7, 0x18",
    "USHF.R.U32.HI UR12, URZ, 0x4, UR7",
    "UMOV UR13, 0x40000040",
    "UMOV UR14, UR12",
    "UMOV UR15, 0x40000040",
)


def test_right_code_passes():
    assert (
        undefined_registers(
            listing(
                *DESCRIPTORS,
                "ULDC.64 UR20, c[0x0][0x208]",
                "@!P4 LDG.E.128 R56, desc[UR20][R74.64+0x100]",
                "UIADD3 UR8, UP0, UR12, 0x2, URZ",
                "UIADD3.X UR9, URZ, 0x40000040, URZ, UP0, !UPT",
                "UIADD3.64 UR10, UR8, 0x2, URZ",
                "HGMMA.64x32x16.F32 R24, gdesc[UR12], RZ, !UPT",
                "HGMMA.64x32x16.F32 R24, gdesc[UR8], R24, gsb0",
                "@!UP0 UMOV UR30, UR7",
                "UIMAD.WIDE UR32, UR30, UR7, URZ",
                "UIADD3.64 UR34, UR32, UR12, URZ",
                "STS.128 [R91+UR30], R12",
            )
        )
        == []
    )


@pytest.mark.parametrize(
    "wrong",
    [
        # as found for 160 features and one key: descriptors from nothing
        "UIADD3 UR18, UP0, UR6, 0x2, URZ",
        "UIADD3.X UR19, UR6, -0x7fffffe0, URZ, UP0, !UPT",
        # its own value before there is one, as found in loops
        "UIADD3 UR18, UP0, UR18, 0x20, URZ",
        "UIADD3.64 UR16, UR4, -UR16, URZ",
        # only the lower half is there
        "UIADD3.64 UR16, UR14, UR7, URZ",
        "HGMMA.64x32x16.F32 R24, gdesc[UR16], R24",
        # the first operand lies in registers: the second's descriptor is at 18 and 19
        "HGMMA.64x128x16.F32 R24, R104, gdesc[UR16].tnspB, R24",
        "LDG.E.128 R56, desc[UR20][R74.64]",
        "STS.128 [R91+UR31], R12",
    ],
)
def test_a_register_that_nothing_wrote_is_found(wrong):
    assert undefined_registers(listing(*DESCRIPTORS, wrong)) == [wrong]


def test_a_descriptor_beside_an_operand_in_registers():
    """Only the second of the two places is read."""
    code = "HGMMA.64x128x16.F32 R24, R104, gdesc[UR12].tnspB, R24"
    assert undefined_registers(listing("UMOV UR14, 0x1", "UMOV UR15, 0x2", code)) == []
