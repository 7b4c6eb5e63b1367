"""Writes what was measured into docs/shapes.md, between its markers, and draws the two figures.

python -m scripts.train_shapes.report --out DIR   (DIR: the folder of the training)
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor

from .evaluate import GUIDANCES, RESULTS, STEPS, Evaluation, generate, load_pipeline

DOCS = Path(__file__).parents[2] / "docs"
GRID_PROMPTS = (
    "a large red circle above a small blue square",
    "a small green star to the left of a yellow ring on a white background",
    "three shapes: a pink ring, a cyan cross and an orange triangle",
    "two purple squares on a mint background",
    "a large yellow star in the center on a navy background",
    "a small red triangle in the top left corner on a beige background",
    "from left to right: a red circle, a green square and a blue star on a white background",
    "from top to bottom, a cyan ring, a pink cross and a yellow circle",
    "a large orange cross below a small purple circle on a gray background",
    "a big blue ring on the right and a tiny pink star on the left",
    "a large green triangle and a large cyan star above a small red ring",
    "something yellow",
)


def write_tables(results: dict[str, Any]) -> None:
    path = DOCS / "shapes.md"
    text = path.read_text()
    for name, lines in (("results", _main_lines(results)), ("table", _table_lines(results["table"]))):
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, "\\1" + "\n".join(lines) + "\n\\2", text, flags=re.DOTALL)
    path.write_text(text)


def _main_lines(results: dict[str, Any]) -> list[str]:
    main, judge, negative = results["main"], results["judge"], results["negative_prompt"]
    rows = {f"everything right, {main['pictures']} held-out captions": main["accuracy"]}
    rows |= {f"everything right, places {name}": value for name, value in main["by_place"].items()}
    rows |= {f"{name} right, where said": value for name, value in main["by_attribute"].items()}
    rows |= {
        "open prompts with something red, without a negative prompt": negative["red_without"],
        'open prompts with something red, `negative_prompt="red"`': negative["red_with"],
        f"judge: true captions accepted, {judge['pictures']} rendered scenes through the VAE": judge["true_accepted"],
        "judge: the same captions with one word exchanged accepted": judge["one_word_wrong_accepted"],
    }
    return ["| measured | share |", "|---|---|", *(f"| {name} | {value:.1%} |" for name, value in rows.items())]


def _table_lines(cells: list[dict[str, float]]) -> list[str]:
    share = {(cell["guidance"], cell["steps"]): cell["accuracy"] for cell in cells}
    lines = ["| guidance | " + " | ".join(f"{steps} steps" for steps in STEPS) + " |", "|---" * (len(STEPS) + 1) + "|"]
    for guidance in GUIDANCES:
        lines.append(f"| {guidance:g} | " + " | ".join(f"{share[guidance, steps]:.0%}" for steps in STEPS) + " |")
    return lines


def draw_loss(log: Path) -> None:
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    samples = [line["samples"] / 1000 for line in lines]
    plt.figure(figsize=(6, 3), dpi=80)
    plt.plot(samples, [line["loss"] for line in lines], linewidth=0.8)
    plt.yscale("log")
    plt.xlabel("thousand samples seen")
    plt.ylabel("flow matching loss")
    plt.tight_layout()
    plt.savefig(DOCS / "images" / "shapes_loss.png")


def draw_grid(pictures: Tensor, path: Path, columns: int = 4) -> None:
    count, channels, side, _ = pictures.shape
    tiles = pictures.view(count // columns, columns, channels, side, side).permute(0, 3, 1, 4, 2)
    pixels = tiles.reshape(count // columns * side, columns * side, channels)
    Image.fromarray((pixels * 255).round().byte().numpy()).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    (DOCS / "images").mkdir(parents=True, exist_ok=True)
    if RESULTS.exists():
        write_tables(json.loads(RESULTS.read_text()))
    draw_loss(options.out / "denoiser.jsonl")
    settings = Evaluation()
    draw_grid(generate(load_pipeline(settings.folder), GRID_PROMPTS, settings), DOCS / "images" / "shapes_grid.png")


if __name__ == "__main__":
    main()
