"""What `python -m bench aot` counts, of code written here: loops, loads in flight, shares of the copy rate, bars."""

import dataclasses

import pytest

pytest.importorskip("triton")

from bench import aot_code
from bench.aot_table import BARS, Kernel, verdicts

LOOP = """
	Function : kernel
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   LDG.E.64 R2, desc[UR4][R20.64] ;
        /*0020*/                   LDG.E.128 R4, desc[UR4][R20.64] ;
        /*0030*/                   LDG.E.128 R8, desc[UR4][R20.64+0x10] ;
        /*0040*/                   FADD R12, R4, R8 ;
        /*0050*/                   LDG.E.128 R4, desc[UR4][R20.64] ;
        /*0060*/                   MUFU.EX2 R13, R4 ;
        /*0070*/                   SHFL.DOWN PT, R3, R2, 0x1, 0x1f ;
        /*0080*/                   STG.E.128 desc[UR4][R22.64], R12 ;
        /*0090*/               @P0 BRA 0x20 ;
        /*00a0*/                   BAR.SYNC 0x0 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   BRA 0xc0 ;
        /*00d0*/                   NOP ;
"""


def test_the_loop_that_moves_the_elements_is_counted():
    (code,) = aot_code.functions(LOOP).values()
    part = aot_code.main_part(code, 0, 4, 0)
    assert part == aot_code.MainPart(True, 12, 8 / 12, 1 / 12, 2, 0, 1, 4)
    assert aot_code.main_part(code, 4, 4, 0).elements == 4
    assert aot_code.instructions_of_all(part, 2) == 8 / 12 + 2
    assert not aot_code.main_part(code, 0, 4, 1).looped  # has too few exponentials: not the loop of logits


def test_a_kernel_without_a_loop_is_counted_whole():
    (code,) = aot_code.functions(LOOP.replace("@P0 BRA 0x20", "IADD3 R1, R1, R2, R3")).values()
    part = aot_code.main_part(code, 0, 4, 0)
    assert (part.looped, part.elements, part.instructions, part.barriers, part.rest) == (False, 12, 1, 1, 0)


def test_shares_are_the_least_of_slots_mufu_and_latency():
    device = aot_code.DEVICES[0]
    part = aot_code.MainPart(True, 8, 10.0, 0.0, 4, 0, 0, 0)
    budget = device.slots / (device.bytes_per_second / 2)
    assert budget == pytest.approx(19.8, abs=0.1)  # bfloat16, read once

    def share(**change):
        return aot_code.copy_share(device, part._replace(**change), 8, 2, 256, 32, 0)

    assert share() == 1
    assert share(instructions=2 * budget) == pytest.approx(0.5)
    assert share(mufu=budget / 4) == pytest.approx(0.5)
    assert share(in_flight=1) == 1 and aot_code.copy_share(device, part._replace(in_flight=1), 8, 2, 256, 255, 0) < 1


def test_each_bar_can_fail():
    case, images = "mixupe_loss-mixed-bfloat16-4096x1000", "mix-random-{}-256x3x224x224"
    good = Kernel("sm_90", case, "row_stats", 128, 1, 40, 0, 0, 4, 0)
    good = dataclasses.replace(good, instructions=9.0, barriers=0, in_flight=4, all_instructions=11.5)
    kernels = [
        *(
            dataclasses.replace(good, kernel=name)
            for name in ("row_stats", "row_gradient", "forward_rows<T>", "backward_rows<T>")
        ),
        *(dataclasses.replace(good, case=images.format(dtype), kernel="mix_rows") for dtype in ("bfloat16", "uint8")),
        *(
            dataclasses.replace(good, case=images.format("bfloat16"), kernel=name)
            for name in ("mix_pairs", "mix_aligned<T>")
        ),
        dataclasses.replace(good, case="mix-channels_last-uint8-256x3x224x224", kernel="mix_aligned<T>"),
        *(
            dataclasses.replace(good, case=f"mix-cut-{dtype}-256x3x224x224", kernel="mix_rows")
            for dtype in ("bfloat16", "float32", "uint8")
        ),
    ]
    judged = verdicts(kernels)
    assert all(met for *_, met in judged) and {bar for bar, *_ in judged} == set(BARS)
    bad = [
        dataclasses.replace(k, instructions=30.0, barriers=1, in_flight=3, all_instructions=40.0, spilled=8)
        for k in kernels
    ]
    assert not any(met for *_, met in verdicts(bad))
    assert all(bar.field == "spilled" for bar, *_ in verdicts([dataclasses.replace(k, target="sm_80") for k in bad]))
