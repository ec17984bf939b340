"""Distil the embedded teacher: python examples/distil_in_ten_lines.py [ITERATIONS]; writes runs/ten-lines."""

import sys
from pathlib import Path

import fewstep
from fewstep.evaluation.pictures import save_pictures
from fewstep.training.options import TrainOptions

iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 400
options = TrainOptions(iterations=iterations, batch=16, warmup=min(10, iterations))
student = fewstep.distill("emoji", "tdm", out="runs/ten-lines", train_options=options)
prompts = ["a 3d frog on a blue background", "a red apple", "two pizzas"]
print(save_pictures(Path("runs/ten-lines/pictures.png"), fewstep.sample(student, prompts, steps=4)))
