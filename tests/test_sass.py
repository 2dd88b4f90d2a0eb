"""The check of wgmma descriptors, on listings as nvdisasm prints them."""

import pytest

pytest.importorskip("triton")

from sass import garbage_descriptors

# UR5 and UR7 are the high words of descriptors of A and B; UR4 and UR6 their addresses.
_CONSTANTS = ["UMOV UR5, 0x40000040", "UMOV UR7, 0x40000040"]
_ADDRESSES = ["USGXT.U32 UR4, UR8, 0xe", "USGXT.U32 UR6, UR9, 0xe"]
_PRODUCT = "HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"


def listing(*lines: str) -> str:
    """Write a kernel of instructions and labels, which end in a colon."""
    text = ['\t.section\t.text.some_kernel,"ax",@progbits', "some_kernel:"]
    for i, line in enumerate(lines):
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*{16 * i:04x}*/                   {line} ;")
    return "\n".join([*text, "        /*fff0*/                   EXIT ;"])


def looped(before: list[str], body: list[str], after: list[str]) -> str:
    return listing(*before, ".L_x_1:", *body, _PRODUCT, *after, "@P0 BRA `(.L_x_1)")


def test_descriptors_that_are_made_before_the_loop_are_good():
    assert not garbage_descriptors(looped(_CONSTANTS + _ADDRESSES, [], []))


def test_a_copy_that_is_made_at_the_end_of_the_loop_is_garbage_in_the_first_pass():
    copies = ["UMOV UR4, UR20", "UMOV UR6, UR21"]
    sources = ["USGXT.U32 UR20, UR8, 0xe", "USGXT.U32 UR21, UR9, 0xe"]
    assert not garbage_descriptors(looped(_CONSTANTS + sources, copies, []))
    (found,) = garbage_descriptors(looped(_CONSTANTS + sources, [], copies))
    assert found.startswith("some_kernel 0050: HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4]")
    assert found.endswith("UR4 may be what it held at the start")


def test_it_says_what_a_register_held_instead():
    before = ["ULDC UR6, c[0x0][0x210]", *_CONSTANTS, _ADDRESSES[0]]
    (found,) = garbage_descriptors(looped(before, [], [_ADDRESSES[1]]))
    assert found.endswith("UR6 may be what 0000: ULDC UR6, c[0x0][0x210] wrote")


@pytest.mark.parametrize(
    ("step", "is_good"),
    [
        ("UIADD3 UR4, UR4, 0x2, URZ", True),  # in the loop: from itself and from before
        ("UIADD3.64 UR4, UR4, 0x4, URZ", True),
        ("UIADD3.X UR5, UR5, 0x40000040, URZ, UP1, !UPT", True),
        ("R2UR UR4, R5", True),
        ("ULOP3.LUT UR4, UR8, 0x3fff, URZ, 0xc0, !UPT", True),
        ("UIADD3 UR4, UR4, UR30, URZ", False),
        ("UIADD3 UR4, UR4, c[0x0][0x210], URZ", False),
        ("USHF.R.U32.HI UR4, URZ, 0x4, UR8", False),
        ("ULDC.64 UR4, c[0x0][0x208]", False),
        ("@UP0 USHF.R.U32.HI UR4, URZ, 0x4, UR8", False),
        ("@UP0 UMOV UR4, URZ", True),
        ("UISETP.NE.AND UP0, UPT, UR4, URZ, UPT", True),  # reads
    ],
)
def test_what_keeps_a_descriptor(step, is_good):
    found = garbage_descriptors(looped(_CONSTANTS + _ADDRESSES, [], [step]))
    assert (not found) == is_good, found


def test_a_mask_may_be_in_a_register():
    cut = ["UMOV UR30, 0x3fff", "ULOP3.LUT UR4, UR8, 0x2000000, UR30, 0xec, !UPT"]
    before = [*_CONSTANTS, _ADDRESSES[1]]
    assert not garbage_descriptors(listing(*before, *cut, _PRODUCT))
    other = [cut[0].replace("0x3fff", "0x7fff"), cut[1]]
    assert garbage_descriptors(listing(*before, *other, _PRODUCT))


def test_only_paths_that_exist_count():
    skipped = [*_CONSTANTS, *_ADDRESSES, "BRA `(.L_x_2)", "ULDC UR4, c[0x0][0x210]", ".L_x_2:"]
    assert not garbage_descriptors(listing(*skipped, _PRODUCT))
    maybe = [line.replace("BRA", "@P0 BRA") for line in skipped]
    assert len(garbage_descriptors(listing(*maybe, _PRODUCT))) == 1


def test_an_operand_in_registers_has_no_descriptor():
    product = "HGMMA.64x32x16.F32.BF16 R24, R40, gdesc[UR4], R24"
    before = [_CONSTANTS[1], _ADDRESSES[1]]  # B alone
    assert not garbage_descriptors(listing(*before, product))
    assert garbage_descriptors(listing(*before, _PRODUCT))
