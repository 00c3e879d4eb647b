"""The CPU path against llama.cpp, in turn, on the same GGUF.

    python -m tests.speed.against_llama_cpp FILE [--prompt 64 256 --decode 32 --batch 20 --rounds 3] [--json OUT.json]

llama.cpp is llama-cpp-python's, which `make peers` builds for this very processor, with its default settings: weights
repacked at load, cache in float16. The machine should be otherwise idle.
"""

from tests.speed.paired import options, run


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--modes", nargs="+", default=["q8"], choices=["q8", "exact"], help="numerics of the CPU path")
    arguments = parser.parse_args()
    run("llama.cpp", [f"cpu:{mode}" for mode in arguments.modes], arguments)


if __name__ == "__main__":
    main()
