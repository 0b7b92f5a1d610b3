"""What a compiled Triton kernel says about itself, with no GPU: its resources, how often it fits on a multiprocessor, and how its loops are pipelined.

The number of buffers is read from Triton's own intermediate form (TTGIR): a lost pipeline stage shows neither in the registers nor in the
instructions. Limits are those of the CUDA C++ Programming Guide, table "Technical specifications per compute capability".
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton


class Machine(NamedTuple):
    """What one multiprocessor has, and what one block can take of it."""

    block_shared: int  # bytes
    shared: int  # bytes, of which each block takes RESERVED more than it asks for
    warps: int
    blocks: int
    tensor_cores: str  # looked for in the PTX
    tma: str


RESERVED = 1024
REGISTERS, REGISTERS_PER_WARP_UNIT, TENSOR_MEMORY_COLUMNS = 65_536, 256, 512
_BULK = "cp.async.bulk.tensor"
MACHINES = {
    80: Machine(163 * 1024, 164 * 1024, 64, 32, "mma.sync", ""),
    90: Machine(227 * 1024, 228 * 1024, 64, 32, "wgmma.mma_async", _BULK),
    100: Machine(227 * 1024, 228 * 1024, 64, 32, "tcgen05.mma", _BULK),
    103: Machine(227 * 1024, 228 * 1024, 64, 32, "tcgen05.mma", _BULK),
    120: Machine(99 * 1024, 100 * 1024, 48, 24, "mma.sync", _BULK),
}


class Loop(NamedTuple):
    """An innermost loop that multiplies tiles."""

    products: int
    buffers: int  # of the operand that has the fewest; 0: operands are loaded where they are used
    pendings: tuple[int, ...]  # products still running behind each wait (wgmma only)
    # groups of asynchronous copies still running behind each wait (cp.async only)
    copies_left: tuple[int, ...]
    # single numbers that are copied through shared memory: an index that the pipeline loads as well
    indices: int


class Usage(NamedTuple):
    registers: int
    local_bytes: int  # stack and spills, per thread
    shared_bytes: int  # of a block
    instructions: int  # SASS
    blocks: int  # that a multiprocessor runs at a time


def accesses(ptx: str) -> Counter[int]:
    """Loads and stores of global memory by the bytes that one of them moves for a thread."""
    found = re.findall(r"\b(?:ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
    return Counter(int(numbers or 1) * int(bits) // 8 for numbers, bits in found)


def loops(ttgir: str) -> list[Loop]:
    """Innermost loops with products, in the order of the text. A region ends at the indentation at which it began."""
    shapes: dict[str, tuple[list[int], str]] = {}  # allocation -> dimensions, element
    sources: dict[str, str] = {}  # view -> allocation
    open_loops: list[dict[str, Any]] = []
    found: list[Loop] = []
    for line in ttgir.splitlines():
        indent, text = len(line) - len(line.lstrip()), line.strip()
        if open_loops and text.startswith("}") and indent == open_loops[-1]["indent"]:
            loop = open_loops.pop()
            if loop["products"] and loop["innermost"]:
                tiles = [d for d, _ in loop["copied"].values() if len(d) == 3]
                found.append(
                    Loop(
                        loop["products"],
                        min((d[0] for d in tiles), default=0),
                        tuple(loop["pendings"]),
                        tuple(loop["copies_left"]),
                        sum(d == [d[0], 1] and e == "i32" for d, e in loop["copied"].values()),
                    )
                )
        if named := re.match(r"%([\w$]+)(?::\d+)? = (ttg\.local_alloc|ttg\.memdesc_index) (?:%(\w+))?", text):
            name, operation, source = named.groups()
            if operation == "ttg.memdesc_index":
                sources[name] = source
            elif kind := re.search(r"-> !ttg\.memdesc<([0-9x]+)x(\w+),", text):
                shapes[name] = [int(d) for d in kind[1].split("x")], kind[2]
        if re.match(r"(%\S+ = )?scf\.for ", text):
            for outer in open_loops:
                outer["innermost"] = False
            open_loops.append(
                {
                    "indent": indent,
                    "innermost": True,
                    "products": 0,
                    "copied": {},
                    "pendings": [],
                    "copies_left": [],
                }
            )
        if not open_loops:
            continue
        loop = open_loops[-1]
        loop["products"] += bool(re.search(r"\b(warp_group_dot|tc_gen5_mma|tt\.dot) %", text))
        if waited := re.search(r"warp_group_dot_wait .*pendings = (\d+)", text):
            loop["pendings"].append(int(waited[1]))
        if waited := re.search(r"ttg\.async_wait .*num = (\d+)", text):
            loop["copies_left"].append(int(waited[1]))
        if "async_tma_copy_global_to_local" in text or "async_copy_global_to_local" in text:
            for name in re.findall(r"%(\w+)", text):
                at = sources.get(name, "")
                if at in shapes and shapes[at][1] != "i64":  # those are barriers
                    loop["copied"][at] = shapes[at]
    return found


class Report(NamedTuple):
    usage: Usage
    loops: list[Loop]
    complaints: list[str]

    def line(self) -> str:
        """Registers, local bytes, shared bytes, SASS instructions, blocks per multiprocessor; buffers and pendings by loop. See HEADER."""
        buffers = ",".join(str(loop.buffers) for loop in self.loops) or "-"
        pendings = ",".join("/".join(map(str, loop.pendings)) for loop in self.loops if loop.pendings) or "-"
        u = self.usage
        return f"{u.registers:9} {u.local_bytes:7} {u.shared_bytes:8} {u.instructions:5} {u.blocks:6} {buffers:>7} {pendings:>8}"


HEADER = f"Triton {triton.__version__}\nregisters local B shared B  SASS blocks buffers pendings  kernel"


def expected_buffers(stages: int, instruction: str) -> int:
    """What `num_stages` is to give an operand. mma.sync takes the last stage from registers; one stage is no pipeline."""
    return 0 if stages == 1 else stages - 1 if instruction == "mma.sync" else stages


def judge(
    compiled: Any,
    arch: int,
    *,
    warps: int,
    stages: int,
    tensor_cores: str | bool,
    tma: bool,
    pendings: int = 0,
    spill: int = 0,
    access_bytes: int = 0,
    uniform: int = 0,
    occupancy: float = 0.0,
) -> Report:
    """Reads a compiled kernel and says what is wrong with it.

    tensor_cores: the instruction that is looked for, True: the architecture's own. With it every loop must have the buffers of `stages`, and no
    index among them. pendings: products that may still run behind a wait of wgmma in the loop, at least one wait of which must allow so many.
    spill: bytes of local memory per thread that are accepted. access_bytes: what every load and store of global memory moves for a thread at least,
    but for `uniform` loads of single numbers. occupancy: share of a multiprocessor's warps that must run at a time.
    """
    machine, ptx = MACHINES[arch], compiled.asm["ptx"]
    found, inner = usage(compiled, arch, warps), loops(compiled.asm["ttgir"])
    instruction = machine.tensor_cores if tensor_cores is True else tensor_cores or ""
    complaints = []
    if found.local_bytes > spill:
        complaints.append(f"{found.local_bytes} bytes of local memory per thread; {spill} are accepted")
    if found.shared_bytes > machine.block_shared:
        complaints.append(f"{found.shared_bytes} bytes of shared memory; a block has {machine.block_shared}")
    if found.blocks < 1:
        complaints.append("no block fits on a multiprocessor")
    share = found.blocks * warps / machine.warps
    if share < occupancy:
        complaints.append(
            f"{share:.0%} of the warps of a multiprocessor run at a time; {occupancy:.0%} are wanted"
        )
    narrow = {size: n for size, n in sorted(accesses(ptx).items()) if size < access_bytes}
    if sum(narrow.values()) > uniform:
        each = ", ".join(f"{n} of {size} bytes" for size, n in narrow.items())
        complaints.append(
            f"accesses of global memory: {each}; {access_bytes} are wanted, but for {uniform} single numbers"
        )
    if instruction not in ptx:
        complaints.append(f"no {instruction} in the PTX")
    if tma and machine.tma not in ptx:
        complaints.append(f"no {machine.tma} in the PTX")
    if instruction:
        wanted = expected_buffers(stages, instruction)
        if not inner:
            complaints.append("no loop with a product")
        for number, loop in enumerate(inner, 1):
            if loop.buffers < wanted:
                complaints.append(
                    f"loop {number}: {loop.buffers} buffers per operand; {stages} stages give {wanted}"
                )
            if loop.indices:
                complaints.append(
                    f"loop {number}: an index goes through the pipeline and takes a stage of it"
                )
            if instruction.startswith("wgmma") and pendings not in loop.pendings:
                complaints.append(
                    f"loop {number}: waits leave {loop.pendings} products running, none of them {pendings}"
                )
    return Report(found, inner, complaints)


def _binary(tool: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool


def usage(compiled: Any, arch: int, warps: int) -> Usage:
    """Read by the cuobjdump and nvdisasm that Triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources, listing = (
            subprocess.run(
                [_binary(tool), option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", resources)}
    shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", 0)
    return Usage(
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        shared,
        len(re.findall(r"/\*[0-9a-f]{4,}\*/ ", listing)),
        occupancy(arch, numbers["REG"], warps, shared, columns),
    )


def occupancy(arch: int, registers: int, warps: int, shared_bytes: int, tensor_columns: int = 0) -> int:
    """Blocks that a multiprocessor runs at a time."""
    machine = MACHINES[arch]
    per_warp = -(-registers * 32 // REGISTERS_PER_WARP_UNIT) * REGISTERS_PER_WARP_UNIT
    limits = [machine.blocks, machine.warps // warps, REGISTERS // (per_warp * warps)]
    limits.append(machine.shared // (shared_bytes + RESERVED))
    if tensor_columns:
        limits.append(TENSOR_MEMORY_COLUMNS // tensor_columns)
    return min(limits)
