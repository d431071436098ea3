"""Training for long and by many at once: flat memory, the same bits, and what hooks raise leaves nothing behind."""

import copy
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import loss_of, make_images, make_pair, needs_native, trained

from densenet_efficient.measure import status_bytes

# With several threads torch's own convolutions and products have other bits than with one.
pytestmark = [needs_native, pytest.mark.usefixtures("one_thread")]
SHORT_STEPS, STEPS = 60, 1000
THREADS = 8
LARGEST_GROWTH = 0.01  # of the resident memory


def make_model(seed=0):
    return make_pair(seed=seed, dtype=torch.float32)[1]


def train(seed):
    return trained(make_model(seed), make_images(4, 3, 40, 40, seed=seed, dtype=torch.float32), steps=10)


def equal(ones, others):
    return ones.keys() == others.keys() and all(torch.equal(ones[name], others[name]) for name in ones)


def growth_of_memory(steps):
    """Of the resident memory from the first tenth of the steps to the end, as a share."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    sizes = [make_images(4, 3, 32 + 8 * index, 64, dtype=torch.float32) for index in range(4)]
    for index in range(steps):
        optimizer.zero_grad()
        loss_of(model(sizes[index % 4])).backward()
        optimizer.step()
        if index == steps // 10:
            before = status_bytes("VmRSS")
    return status_bytes("VmRSS") / before - 1


def send_growth(steps, connection):
    connection.send(growth_of_memory(steps))


def test_memory_stays_flat(in_full, record):
    steps = STEPS if in_full else SHORT_STEPS
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=send_growth, args=(steps, sender))
    process.start()
    assert receiver.poll(600)
    growth = receiver.recv()
    process.join()
    record(training_steps=steps, memory_growth=round(growth, 5))
    assert growth <= LARGEST_GROWTH


def test_threads_that_train_at_once(record):
    expected = [train(seed) for seed in range(THREADS)]
    models = [make_model(seed) for seed in range(THREADS)]  # here: all threads draw from one generator
    images = [make_images(4, 3, 40, 40, seed=seed, dtype=torch.float32) for seed in range(THREADS)]
    together = threading.Barrier(THREADS)

    def run(seed):
        torch.set_num_threads(1)
        together.wait()
        return trained(models[seed], images[seed], steps=10)

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(run, range(THREADS)))
    record(threads=THREADS)
    assert all(map(equal, found, expected))


@pytest.mark.filterwarnings("ignore:a dense block runs layer by layer")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_an_exception_in_a_hook(direction):
    model = make_model()
    images = make_images(2, 3, 40, 40, dtype=torch.float32)
    expected = trained(copy.deepcopy(model), images)

    def fail(*_):
        raise ArithmeticError("of the hook")

    layer = model.features.denseblock2.denselayer1
    damaged = copy.deepcopy(model)
    hooked = damaged.features.denseblock2.denselayer1
    assert type(layer) is type(hooked)
    handle = hooked.register_forward_hook(fail) if direction == "forward" else hooked.register_full_backward_hook(fail)
    before = {name: value.clone() for name, value in damaged.state_dict().items()}
    with pytest.raises(ArithmeticError, match="of the hook"):
        loss_of(damaged(images)).backward()
    handle.remove()
    damaged.load_state_dict(before)
    assert equal(trained(damaged, images), expected)


def train_here(connection):
    torch.set_num_threads(1)
    connection.send({name: value.detach().numpy() for name, value in train(0).items()})


@pytest.mark.own_process
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers(method):
    """A child process trains to the bits of its parent, whose threads a fork does not have."""
    torch.set_num_threads(2)
    train(0)
    torch.set_num_threads(1)
    expected = train(0)
    receiver, sender = multiprocessing.Pipe()
    process = multiprocessing.get_context(method).Process(target=train_here, args=(sender,))
    process.start()
    assert receiver.poll(120), "the worker hangs"
    found = {name: torch.from_numpy(value) for name, value in receiver.recv().items()}
    process.join()
    assert process.exitcode == 0
    assert equal(found, expected)
