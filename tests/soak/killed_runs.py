"""Training runs killed at random moments, each continued to its end: prints how many, as JSON.

Every run is a fork of this process, which has imported everything and never computed anything.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import torch  # noqa: E402
from training_cases import assert_same_bits, fit, make_images, weights  # noqa: E402

from densenet_efficient.training import cli  # noqa: E402, F401, so that forks need not import it

OPTIONS = ("--save_every_n_steps", "1", "--trainer.max_epochs", "2")


def start(images, output):
    """A run in a fork, from the beginning or where it was."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        torch.set_num_threads(1)
        status = fit(images, output, *OPTIONS, "--ckpt_path", "last")
    finally:
        os._exit(status)


def finish(images, output):
    _, status = os.waitpid(start(images, output), 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"the run in {output} ended with {status}"


def main():
    folder, runs = Path(sys.argv[1]), int(sys.argv[2])
    images = make_images(folder / "images", per_class=6)
    begun = time.monotonic()
    finish(images, folder / "whole")
    duration = time.monotonic() - begun
    whole, generator, killed, with_checkpoint = weights(folder / "whole"), random.Random(0), 0, 0
    while killed < runs:
        output = folder / str(killed)
        child = start(images, output)
        time.sleep(generator.uniform(0.1, 0.95) * duration)
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL:
            killed += 1
            with_checkpoint += (output / "last.ckpt").exists()
        finish(images, output)  # also one that ended before it could be killed
        assert_same_bits(weights(output), whole)
        shutil.rmtree(output)
    print(json.dumps({"killed_runs": killed, "continued_from_a_checkpoint": with_checkpoint}))


if __name__ == "__main__":
    main()
