"""The MLX path against mlx-lm, in turn, on the same MLX or Hugging Face directory and on MLX's default device.

    python -m tests.speed.against_mlx_lm DIRECTORY [--prompt 64 256 --decode 32 --batch 20 --rounds 3] [--json OUT.json]

Sequences of a batch are of equal length. On a Mac with less memory than twice the weights, one engine ends before the
other begins.
"""

from tests.speed.paired import options, run


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--mode", default="bfloat16", choices=["bfloat16", "float32"], help="of both engines")
    arguments = parser.parse_args()
    run(f"mlx-lm:{arguments.mode}", [f"metal:{arguments.mode}"], arguments)


if __name__ == "__main__":
    main()
