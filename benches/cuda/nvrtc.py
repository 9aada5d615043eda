#!/usr/bin/env python3
"""Compiles the kernels that cuda_text wrote, with NVRTC and ptxas, and prints a Markdown table of what they need.

    cargo run -p limbeck-kernels --features cuda-text --example cuda_text -- target/cuda
    python benches/cuda/nvrtc.py target/cuda

Needs no GPU: pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12. Exits 1 when a kernel does
not compile, spills more than a few registers, or multiplies tiles without matrix instructions where it should have them.
"""

import concurrent.futures
import ctypes
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ARCHITECTURES = ["sm_80", "sm_90a", "sm_100"]
ELEMENTS = ["f32", "f16", "bf16"]
# What ptxas may spill to keep within a round number of registers, stored and loaded.
FEW_BYTES = 64
# Kernels that take tensor cores for all types but f32, whose numbers would be rounded to TF32.
MULTIPLY_TILES = ("attention_", "grouped_")


def nvidia_folders():
    found = importlib.util.find_spec("nvidia")
    if found is None:
        sys.exit("no NVIDIA packages here; pip install nvidia-cuda-nvrtc-cu12 nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12")
    return [pathlib.Path(folder) for folder in found.submodule_search_locations]


def find(pattern):
    for folder in nvidia_folders():
        for path in sorted(folder.glob(pattern)):
            if ".alt." not in path.name:
                return path
    sys.exit(f"no {pattern} among the NVIDIA packages; install nvidia-cuda-nvrtc-cu12 and nvidia-cuda-nvcc-cu12")


class Nvrtc:
    def __init__(self):
        self.library = ctypes.CDLL(str(find("**/libnvrtc.so*")))
        self.includes = [path for folder in nvidia_folders() for path in folder.glob("*/include")]
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"
        count = ctypes.c_int()
        self.library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        architectures = (ctypes.c_int * count.value)()
        self.library.nvrtcGetSupportedArchs(architectures)
        self.known = set(architectures)

    def ptx(self, path, architecture):
        """The PTX of a file, or None and why there is none."""
        program = ctypes.c_void_p()
        status = self.library.nvrtcCreateProgram(
            ctypes.byref(program), path.read_bytes(), path.name.encode(), 0, None, None
        )
        if status:
            return None, f"nvrtc error {status}"
        options = [f"--gpu-architecture={architecture}"] + [f"--include-path={folder}" for folder in self.includes]
        options = [option.encode() for option in options]
        status = self.library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        if status:
            return None, self.text(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
        return self.text(program, "nvrtcGetPTXSize", "nvrtcGetPTX"), ""

    def text(self, program, size_name, name):
        size = ctypes.c_size_t()
        getattr(self.library, size_name)(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        getattr(self.library, name)(program, text)
        return text.value.decode()


def needs(ptxas, ptx, architecture):
    """Registers and bytes spilled, as ptxas tells them."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.ptx")
        path.write_text(ptx)
        found = subprocess.run(
            [ptxas, "-v", f"-arch={architecture}", path, "-o", path.with_suffix(".cubin")],
            capture_output=True,
            text=True,
        )
    if found.returncode:
        return None, found.stderr

    def number(pattern):
        return sum(int(value) for value in re.findall(pattern, found.stderr))

    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return (number(r"Used (\d+) registers"), spilled), ""


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    files = sorted(pathlib.Path(sys.argv[1]).glob("*.cu"))
    if not files:
        sys.exit(f"no .cu in {sys.argv[1]}; run cuda_text first")
    nvrtc, ptxas = Nvrtc(), find("**/bin/ptxas")
    architectures = [name for name in ARCHITECTURES if int(re.sub(r"\D", "", name)) in nvrtc.known]

    def compiled(path):
        results = []
        for architecture in architectures:
            ptx, problem = nvrtc.ptx(path, architecture)
            found = None
            if ptx is not None:
                found, problem = needs(ptxas, ptx, architecture)
            results.append((ptx, found, problem))
        return results

    rows, bad = {}, []
    # Both compilers run outside Python's lock.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        all_results = list(pool.map(compiled, files))
    for path, results in zip(files, all_results):
        cells = []
        for architecture, (ptx, found, problem) in zip(architectures, results):
            if found is None:
                bad.append(f"{path.name} for {architecture}: {problem}")
                cells.append("fails")
                continue
            if found[1] > FEW_BYTES:
                bad.append(f"{path.name} for {architecture}: {found[1]} bytes spilled")
            cells.append(" / ".join(str(value) for value in found))
        shared = re.match(r"// (\d+) bytes of shared memory", path.read_text())
        cells.append(shared[1] if shared else "?")
        # Of the last architecture; all have the same.
        products = len(re.findall(r"^\s*wmma\.mma", ptx or "", re.MULTILINE))
        cells.append(str(products) if products else "")
        # One line for all types that need the same.
        name, _, element = path.stem.rpartition("_")
        if element not in ELEMENTS:
            name, element = path.stem, ""
        if name.startswith(MULTIPLY_TILES) and element != "f32" and not products:
            bad.append(f"{path.name}: no matrix instructions")
        rows.setdefault((name, tuple(cells)), []).append(element)
    print(f"NVRTC {nvrtc.version}, {len(files)} kernels; per architecture registers / bytes spilled.\n")
    print("| kernel | " + " | ".join(architectures) + " | bytes of shared memory | matrix instructions |")
    print("|---|" + "---|" * (len(architectures) + 2))
    for (name, cells), elements in rows.items():
        elements = " " + ", ".join(elements) if elements != [""] else ""
        print(f"| `{name}`{elements} | " + " | ".join(cells) + " |")
    if bad:
        sys.exit("\n".join(bad))


if __name__ == "__main__":
    main()
