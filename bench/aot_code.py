"""What a kernel costs, read from its machine code: instructions an element, loads in flight, what a GPU could make of it.

The main part of a kernel is the loop that moves the elements: of those with wide accesses (16 bytes), and with
stores where the kernel has any, the one of the fewest instructions an element. The others are edges, rows that lie
unaligned, and sums that few rows need. A kernel without a loop is its own main part, once a tile. Code is counted as it stands, whether or not a branch leads around it.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    def is_wide(self, access: str) -> bool:
        """Whether it moves 16 bytes a thread or more from (``LDG``) or to (``STG``) global memory."""
        return self.name.startswith(access) and self.width >= 16

    @property
    def width(self) -> int:
        return next((int(size) // 8 for size in ("256", "128", "64") if f".{size}" in self.name), 4)


class MainPart(NamedTuple):
    """Of the part of a kernel that moves its elements: ``elements`` a thread and pass, the rest an element or a pass."""

    looped: bool
    elements: int
    instructions: float
    mufu: float
    in_flight: int
    barriers: int
    shuffles: int
    rest: int  # instructions of the kernel outside it


class Device(NamedTuple):
    """A GPU as the predictions take it; rates of a copy as DESIGN has them, no GPU having run any of this here."""

    name: str
    bytes_per_second: float
    multiprocessors: int = 132
    clock: float = 1.755e9

    @property
    def slots(self) -> float:
        """Instructions of a thread issued a second: four warps of 32 a cycle."""
        return self.multiprocessors * 4 * 32 * self.clock


DEVICES = (Device("h100", 3.0e12), Device("h200", 4.3e12))
LATENCY = 0.8e-6  # seconds from a load to its value, under load: assumed
THREADS, REGISTERS, SHARED = 2048, 65536, 227 << 10  # of a multiprocessor
MUFU_SHARE = 1 / 8  # of the slots: 16 results a cycle


def dump(cubin: bytes | Path, option: str = "-sass") -> str:
    """What cuobjdump says of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        if isinstance(cubin, bytes):
            file.write(cubin)
            file.flush()
            cubin = Path(file.name)
        return subprocess.run([TOOL, option, cubin], capture_output=True, text=True, check=True).stdout


def functions(text: str) -> dict[str, list[Instruction]]:
    """Name → instructions, but for the padding, of each kernel in a dump of SASS."""
    found = {}
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name, body = part.split("\n", 1)
        lines = re.finditer(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", body)
        code = [Instruction(int(line[1], 16), line[2], line[3]) for line in lines if line[2] != "NOP"]
        while code and code[-1].name.startswith("BRA"):  # to itself, behind the end
            code.pop()
        found[name.strip()] = code
    return found


def _loops(code: list[Instruction]) -> list[slice]:
    place = {instruction.address: i for i, instruction in enumerate(code)}
    found = []
    for i, instruction in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", instruction.operands) if instruction.name.startswith("BRA") else None
        if target and place.get(int(target[1], 16), i) < i:
            found.append(slice(place[int(target[1], 16)], i + 1))
    return [loop for loop in found if not any(loop.start <= o.start and o.stop < loop.stop for o in found)]


def _moved(code: list[Instruction], access: str) -> int:
    return sum(i.width for i in code if i.is_wide(access))


def _number(code: list[Instruction], name: str) -> int:
    return sum(instruction.name.startswith(name) for instruction in code)


def _in_flight(code: list[Instruction]) -> int:
    """The most wide loads that are on their way before the value of any is used."""
    most, waiting, count = 0, set(), 0
    for instruction in code:
        registers = {int(number) for number in re.findall(r"\bR(\d+)\b", instruction.operands)}
        if instruction.is_wide("LDG"):
            first = re.match(r"R(\d+)", instruction.operands)  # none of LDGSTS, to shared memory
            waiting |= set(range(int(first[1]), int(first[1]) + instruction.width // 4)) if first else set()
            count += 1
            most = max(most, count)
        elif registers & waiting and not instruction.name.startswith("CS2R"):
            waiting, count = set(), 0
    return most


def main_part(code: list[Instruction], stored: int, loaded: int, mufu: int) -> MainPart | None:
    """The main part of a kernel whose elements are ``stored`` bytes each, or ``loaded`` if that is 0; None without any.

    It has ``mufu`` MUFU an element at least, which tells a row's logits from its targets and class weights.
    """
    access, size = ("STG", stored) if stored else ("LDG", loaded)
    if not _moved(code, access) or not _moved(code, "LDG"):
        return None

    def is_main(loop: slice) -> bool:
        elements = _moved(code[loop], access) / size
        return elements > 0 and _moved(code[loop], "LDG") > 0 and _number(code[loop], "MUFU") >= mufu * elements

    loops = [loop for loop in _loops(code) if is_main(loop)]
    best = min(loops, key=lambda s: (s.stop - s.start) / _moved(code[s], access), default=None)
    inside = code[best] if best else code
    elements = _moved(inside, access) // size
    if not elements:
        return None
    return MainPart(
        best is not None, elements, len(inside) / elements, _number(inside, "MUFU") / elements, _in_flight(inside),
        _number(inside, "BAR"), _number(inside, "SHFL"), len(code) - len(inside),
    )  # fmt: skip


def instructions_of_all(part: MainPart, work: float) -> float:
    """Instructions an element, everything counted, for a thread that has ``work`` elements, those beyond its row included."""
    return part.instructions + part.rest / max(work, 1)


def copy_share(
    device: Device, part: MainPart, work: float, size: float, threads: int, registers: int, shared: int
) -> float:
    """The share of the copy rate that the kernel could reach: the least of what issue slots, MUFU and latency allow.

    ``size`` is the bytes an element must move. As many blocks as registers, shared memory and threads allow are on each
    multiprocessor, their loads always on their way; what other warps wait for costs nothing.
    """
    elements = device.bytes_per_second / size
    by_issue = device.slots / instructions_of_all(part, work) / elements
    by_mufu = device.slots * MUFU_SHARE / part.mufu / elements if part.mufu else 1.0
    warps = threads / 32
    blocks = min(THREADS // threads, int(REGISTERS / (-(-registers // 8) * 8 * 32 * warps)), SHARED // (shared + 1024))
    waiting = blocks * threads * part.in_flight * 16 * device.multiprocessors
    by_latency = waiting / (device.bytes_per_second * LATENCY)
    return min(1.0, by_issue, by_mufu, by_latency)
