"""The kernels as torch operators: opcheck, torch.compile, DDP, gathered and tied weights, a second backward pass."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pact_fast.errors import PactError
from pact_fast.kernels import TokenPairs, linear_logprob, pact_loss
from pact_fast.kernels.head import loss
from tests.support.loss_inputs import ROWS, VOCAB, WIDTH, inputs, tokens
from tests.support.processes import WARM

OPTIONS = dict(kl_coef=0.1, entropy_coef=0.05, importance_cap=2.0, temperature=0.8, softcap=10.0)


@pytest.mark.parametrize("dtype, backend", [(torch.float64, "torch"), (torch.float32, "auto")])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.slow
def test_opcheck_of_linear_logprob(dtype, backend, with_bias):
    from pact_fast.kernels.head.logprob import linear_logprob_op

    hidden, weight, bias = inputs(dtype)
    targets = torch.randint(VOCAB, (ROWS,))
    arguments = (hidden, weight, bias if with_bias else None, targets, torch.ones(ROWS), 10.0, backend)
    torch.library.opcheck(linear_logprob_op, arguments)


@pytest.mark.parametrize("dtype, backend", [(torch.float64, "torch"), (torch.float32, "auto")])
@pytest.mark.parametrize("paired", [True, False])
def test_opcheck_of_pact_loss(dtype, backend, paired, monkeypatch):
    """With the arguments that pact_loss itself passes on."""
    seen = {}
    op = loss.pact_loss_op

    def spy(*arguments, **settings):
        seen.update(arguments=arguments, settings=settings)
        return op(*arguments, **settings)

    monkeypatch.setattr(loss, "pact_loss_op", spy)
    hidden, weight, bias = inputs(dtype)
    pairs = TokenPairs(torch.tensor([[0, 1], [3, 4]]), torch.ones(2)) if paired else None
    pact_loss(hidden, weight, tokens(), bias=bias, pairs=pairs, backend=backend, **OPTIONS)
    torch.library.opcheck(op, seen["arguments"], seen["settings"])


@pytest.fixture
def inductor():
    """Inductor in this process, without optimisations: each test for vector instructions costs a compilation."""
    from torch._inductor import config

    with config.patch({"compile_threads": 1, "cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": False}):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("policy_loss", ["ppo", "cispo", "gspo"])
def test_compiled_losses_and_gradients_are_the_eager_ones(policy_loss, inductor):
    table = tokens()

    def run(hidden, weight, bias):
        x = torch.nn.functional.rms_norm(hidden, (WIDTH,))  # something to fuse before and after the operator
        value = pact_loss(x, weight, table, policy_loss=policy_loss, bias=bias, **OPTIONS).loss
        logprob = linear_logprob(x, weight, torch.arange(ROWS), bias=bias).logprob
        return 0.5 * value + logprob.sigmoid().sum()

    def gradients(function):
        torch._dynamo.reset()
        arguments = inputs()
        value = function(*arguments)
        return [value.detach(), *torch.autograd.grad(value, arguments)]

    compiled = gradients(torch.compile(run, fullgraph=True))
    for a, b in zip(compiled, gradients(run), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong, mode", [(-100, "inductor"), *itertools.product([-100, -1, VOCAB], ["eager", "aot_eager"])]
)
@pytest.mark.parametrize("backend", ["torch", "cpp", "triton"])
def test_a_target_outside_the_vocabulary_is_an_error_in_compiled_graphs_too(backend, mode, wrong, request):
    if mode == "inductor":
        request.getfixturevalue("inductor")
    hidden, weight, _ = inputs()
    table = tokens()
    targets = torch.arange(ROWS)
    targets[3] = table.target[7] = wrong

    def logprobs(targets):
        return linear_logprob(hidden * 2.0, weight, targets, backend=backend).logprob

    def value(table):
        return pact_loss(hidden * 2.0, weight, table, backend=backend).loss

    for function, argument, place in ((logprobs, targets, 3), (value, table, 7)):
        torch._dynamo.reset()
        run = function if mode == "eager" else torch.compile(function, fullgraph=True, backend=mode)
        with pytest.raises(PactError, match=f"target {wrong} of token {place} is outside the vocabulary of {VOCAB}"):
            run(argument)


@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
@pytest.mark.parametrize("index, message", [([[0, 1], [3, 20]], "outside the table of 20"),
                                            ([[0, -1], [3, 4]], "outside the table of 20"),
                                            ([[0, 1], [1, 4]], "two pairs")])  # fmt: skip
def test_pairs_outside_the_table_are_an_error_in_compiled_graphs_too(index, message, mode):
    hidden, weight, _ = inputs()
    table = tokens()

    def value(index):
        return pact_loss(hidden * 2.0, weight, table, pairs=TokenPairs(index, torch.ones(2))).loss

    torch._dynamo.reset()
    run = value if mode == "eager" else torch.compile(value, fullgraph=True, backend=mode)
    with pytest.raises(PactError, match=message):
        run(torch.tensor(index))


def test_a_second_backward_pass_gives_the_same_gradients():
    arguments = inputs()
    value = 3.0 * pact_loss(*arguments[:2], tokens(), bias=arguments[2]).loss
    first = torch.autograd.grad(value, arguments, retain_graph=True)
    first = [g.clone() for g in first]
    second = torch.autograd.grad(value, arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, arguments)


def test_the_last_backward_pass_hands_its_gradient_over_without_a_copy():
    hidden, weight, _ = inputs()
    value = pact_loss(hidden, weight, tokens()).loss
    made = {t.data_ptr() for t in value.grad_fn.saved_tensors}
    value.backward()
    assert weight.grad.data_ptr() in made and hidden.grad.data_ptr() in made


def test_small_fp16_gradients_survive_until_the_loss_scale_comes():
    scale = 2.0**16
    table = tokens()
    table.rl_weight, table.sft_weight = table.rl_weight * 1e-7, table.sft_weight * 1e-7

    def gradients(dtype):
        arguments = [t.detach().half().to(dtype).requires_grad_() for t in inputs()]
        return torch.autograd.grad(scale * pact_loss(*arguments[:2], table).loss, arguments[:2])

    for a, b in zip(gradients(torch.float16), gradients(torch.float64), strict=True):
        assert (a.double() - b).norm() <= 2e-3 * b.norm()


def test_tied_embeddings_get_both_gradients():
    hidden, weight, _ = inputs(torch.float64)
    table = tokens()
    ids = torch.arange(ROWS)
    tied = torch.autograd.grad(pact_loss(hidden * weight[ids], weight, table).loss, weight)[0]
    embedding, head = (weight.detach().clone().requires_grad_() for _ in range(2))
    apart = torch.autograd.grad(pact_loss(hidden * embedding[ids], head, table).loss, (embedding, head))
    torch.testing.assert_close(tied, sum(apart), rtol=1e-12, atol=1e-12)


def test_weights_that_are_gathered_for_the_forward_pass_alone():
    """As ZeRO-3 does: the full weight is gone again by the time of the backward pass, pact_loss needs it no more."""
    hidden, weight, _ = inputs()
    expected = torch.autograd.grad(pact_loss(hidden, weight, tokens()).loss, (hidden, weight))
    value = pact_loss(hidden, weight, tokens()).loss
    weight.data = torch.empty_like(weight).fill_(torch.nan)  # released
    given = torch.autograd.grad(value, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


class Policy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        _, weight, _ = inputs()
        self.decoder = torch.nn.Linear(WIDTH, WIDTH)
        torch.nn.init.eye_(self.decoder.weight)
        torch.nn.init.zeros_(self.decoder.bias)
        self.head = torch.nn.Parameter(weight.detach())

    def forward(self, hidden, table):
        return pact_loss(self.decoder(hidden), self.head, table).loss


def one_rank(rank: int, store: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = torch.nn.parallel.DistributedDataParallel(Policy())
    model(inputs(grad=False)[0], tokens(seed=rank)).backward()
    if rank == 0:
        results.put([p.grad.numpy() for p in model.parameters()])
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_averages_the_gradients_of_both_ranks(tmp_path):
    results = WARM.SimpleQueue()
    ranks = mp.start_processes(
        one_rank, args=(str(tmp_path / "store"), results), nprocs=2, join=False, start_method="forkserver"
    )
    shared = [torch.from_numpy(g) for g in results.get()]
    ranks.join()
    model = Policy()
    for seed in range(2):
        (model(inputs(grad=False)[0], tokens(seed=seed)) / 2).backward()
    for a, p in zip(shared, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-5, atol=1e-7)
