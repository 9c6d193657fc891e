"""Threads: any number gives the same bits, kernels may run on several at once, and a process may fork after use."""

from __future__ import annotations

import os
import threading
import time

import families
import pytest
import reference
import torch
from torch import nn

import pysparse
from pysparse import backend

pytestmark = pytest.mark.skipif(
    not backend.available(), reason=f"no compiled core: {backend.missing_reason()}"
)
ROWS, COLS = 520, 520  # enough bytes for several threads in every format
CHILD_SECONDS = 60  # a child that has not answered by then waits for threads that it does not have


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def product_of(key, tokens=3):
    """A call without arguments that computes one product of the kernel's family, with two threads or more."""
    family, dtype = families.family_of(key), families.DTYPES[key.dtype]
    weight = family.fit(reference.sparse_matrix(ROWS, COLS, 0.5, dtype), 0)
    x, bias = torch.randn(tokens, COLS).to(dtype), torch.randn(ROWS).to(dtype)
    packed = family.pack(weight, 0)
    return lambda: family.run(x, packed, bias, 0)


@pytest.fixture
def no_measuring(monkeypatch):
    """Kernels are chosen by fixed rules: what is tested is their threads, not the costs of this machine."""
    monkeypatch.setattr("pysparse.nn.dispatch.SMALL_WEIGHT", 1 << 40)


def two_layers(sparsity, width=512):
    model = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
    for layer in (model[0], model[2]):
        keep = torch.rand_like(layer.weight) >= sparsity
        layer.weight.data.mul_(keep)
    pysparse.sparsify_(model.eval().requires_grad_(False))
    return model


def best_kernels():
    """Every kernel; those that a better level replaces on this CPU only in the slow run."""
    best = {keys[0] for keys in families.kernels_by_family().values()}
    marked = []
    for param in families.kernel_params():
        (key,) = param.values
        marks = [*param.marks, *([] if key in best else [pytest.mark.slow])]
        marked.append(pytest.param(key, id=param.id, marks=marks))
    return marked


@pytest.mark.parametrize("key", families.kernel_params())
def test_the_number_of_threads_may_change_between_calls(key):
    product = product_of(key)
    results = []
    with backend.force_isa(key.isa):
        for count in (1, 2, 3, 1, 5):
            torch.set_num_threads(count)
            results.append(product())
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("key", best_kernels())
def test_python_threads_share_a_kernel(key):
    """Each thread multiplies by a matrix of its own, then all by one; the answers are those of one thread."""
    torch.set_num_threads(2)
    own, shared = [product_of(key) for _ in range(2)], product_of(key)
    with backend.force_isa(key.isa):
        expected = [(product(), shared()) for product in own]
        found = run_at_once([lambda p=product: [(p(), shared()) for _ in range(3)] for product in own])
    for one, rounds in zip(expected, found, strict=True):
        assert all(torch.equal(one[0], mine) and torch.equal(one[1], ours) for mine, ours in rounds)


def test_two_models_on_two_python_threads(no_measuring):
    torch.set_num_threads(2)
    models = [two_layers(sparsity) for sparsity in (0.6, 0.8)]
    inputs = [
        [torch.randn(tokens, 512) for tokens in (1, 3, 8)] for _ in models
    ]  # by kernel, whatever costs say
    expected = [[model(x) for x in xs] for model, xs in zip(models, inputs, strict=True)]
    found = run_at_once(
        [
            lambda m=model, xs=xs: [[m(x) for x in xs] for _ in range(4)]
            for model, xs in zip(models, inputs, strict=True)
        ]
    )
    for one, rounds in zip(expected, found, strict=True):
        for outputs in rounds:
            assert all(torch.equal(a, b) for a, b in zip(one, outputs, strict=True))


def run_at_once(calls):
    """Run each call on a thread of its own, started together; returns the results, raises what they raise."""
    results, errors = [None] * len(calls), []
    start = threading.Barrier(len(calls))

    def work(index):
        try:
            start.wait(CHILD_SECONDS)
            with torch.no_grad():
                results[index] = calls[index]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(CHILD_SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    if errors:
        raise errors[0]
    return results


def exit_code_of_child(work):
    """Fork, run ``work() -> bool`` in the child, and return its exit code (0: true); None if it never ends."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if work() else 1
        finally:
            os._exit(code)
    deadline = time.monotonic() + CHILD_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


# Python 3.12 warns of any fork beside threads; that this one is safe is what is tested.
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("key", best_kernels())
def test_a_forked_child_computes_the_same(key):
    torch.set_num_threads(2)
    product = product_of(key)
    with backend.force_isa(key.isa):
        expected = product()
        assert exit_code_of_child(lambda: torch.equal(product(), expected)) == 0
        assert torch.equal(product(), expected)  # and so does the parent, whose pool was dissolved


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_and_grandchildren_of_a_model_that_was_used(no_measuring):
    torch.set_num_threads(2)
    model, x = two_layers(0.7), torch.randn(4, 512)
    big = torch.randn(600, 600)
    expected, dense = model(x), big @ big  # torch's own threads survive the fork as well

    def same():
        return torch.equal(model(x), expected) and torch.equal(big @ big, dense)

    assert exit_code_of_child(lambda: same() and exit_code_of_child(same) == 0 and same()) == 0
    assert same()
