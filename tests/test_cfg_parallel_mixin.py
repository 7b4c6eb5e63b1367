"""CFGParallelMixin: the sequential result on every rank, bit for bit, and each branch run once, where it belongs."""

import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

from denoised.models.cfg_parallel import CFGParallelMixin
from denoised.steps.current import current_task, inside_engine, set_current_task
from denoised.steps.deferred import Deferred, Source, plain
from tests.ranks import run_on_ranks

GUIDE = Path(__file__).parents[1] / "docs" / "cfg_parallel_mixin.md"
WORLDS = [1, 2, 3]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Toy(CFGParallelMixin):
    """Predicts noise that depends on the branch alone, and remembers which branches it ran."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.transformer = self.forward

    def forward(self, branch: int) -> tuple[torch.Tensor, ...]:
        self.ran.append(branch)
        return noise(2, 6, 8, seed=branch), noise(1)


class TwoModalities(Toy):
    """Video in bf16 and audio in fp32, of different shapes, which also differ from branch to branch in length."""

    def predict_noise(self, branch: int) -> tuple[torch.Tensor, ...]:
        self.ran.append(branch)
        return noise(2, 6, 8, seed=branch).bfloat16(), noise(2, 5, 3, seed=branch + 50).transpose(0, 2)


class Failing(Toy):
    """Fails in one branch."""

    def __init__(self, bad: int) -> None:
        super().__init__()
        self.bad = bad

    def predict_noise(self, branch: int) -> torch.Tensor:
        if branch == self.bad:
            raise KeyError(f"branch {branch} has no weights")
        return noise(2, 3)


class AnyShape(Toy):
    """Predictions whose form depends on the branch, combined by keeping them all."""

    KINDS = (
        torch.ones(3, dtype=torch.bool),
        torch.ones(2, 2, dtype=torch.complex64),
        torch.full((4,), 0.5, dtype=torch.float8_e4m3fn),
        torch.zeros(0, 5),
        torch.tensor(7, dtype=torch.int64),
        torch.ones(2, 3, requires_grad=True) * 2,
    )

    def predict_noise(self, branch: int) -> torch.Tensor:
        return self.KINDS[branch]

    def combine_multi_branch_cfg_noise(self, predictions: Any, scale: Any, normalize: bool = False) -> Any:
        return tuple(predictions)


def same(left: Any, right: Any) -> bool:
    """Equal in form, dtype and every bit."""
    if isinstance(left, tuple):
        return isinstance(right, tuple) and all(same(*pair) for pair in zip(left, right, strict=True))
    return left.dtype == right.dtype and torch.equal(left, right) and left.stride() == right.stride()


# --- any number of branches on any number of ranks


def branches_of(kind: type[Toy], count: int, guided: bool, options: dict[str, Any]) -> tuple[Any, list[int]]:
    pipe = kind()
    branches = [{"branch": i} for i in range(count)]
    scales = [2.0, 3.5, 0.7][: count - 1]
    return pipe.predict_noise_with_multi_branch_cfg(guided, scales, branches, **options), pipe.ran


def branches_on_rank(rank: int, world_size: int, *args: Any) -> tuple[Any, list[int]]:
    return branches_of(*args)


@pytest.mark.parametrize("options", [{}, {"cfg_normalize": True}, {"output_slice": 3}], ids=["plain", "norm", "slice"])
@pytest.mark.parametrize("kind", [Toy, TwoModalities])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("world_size", WORLDS)
def test_branches_are_dealt_and_every_rank_gets_the_sequential_result(world_size, count, kind, options):
    expected, _ = branches_of(kind, count, True, options)
    for rank, (result, ran) in enumerate(run_on_ranks(branches_on_rank, world_size, kind, count, True, options)):
        assert same(result, expected)
        assert ran == list(range(rank, count, world_size))


@pytest.mark.parametrize("world_size", WORLDS)
def test_without_guidance_one_rank_runs_the_first_branch_for_all(world_size):
    expected, _ = branches_of(Toy, 3, False, {})
    results = run_on_ranks(branches_on_rank, world_size, Toy, 3, False, {})
    assert all(same(result, expected) for result, _ in results)
    assert [ran for _, ran in results] == [[0], [], []][:world_size]


def any_shape(rank: int, world_size: int) -> list[Any]:
    predictions = AnyShape().predict_noise_with_multi_branch_cfg(True, None, [{"branch": i} for i in range(6)])
    return [(str(tensor.dtype), tensor.shape, tensor.tolist(), tensor.requires_grad) for tensor in predictions]


def test_branches_may_differ_in_shape_and_dtype():
    expected = [(str(tensor.dtype), tensor.shape, tensor.tolist(), False) for tensor in AnyShape.KINDS]
    assert run_on_ranks(any_shape, 2) == [expected, expected]


def pairs(rank: int, world_size: int) -> tuple[Any, list[int]]:
    pipe = Toy()
    pair, _ = dist.new_subgroups(group_size=2)
    pipe.set_cfg_parallel_group(pair)
    first = 10 * (rank // 2)
    branches = [{"branch": first}, {"branch": first + 1}]
    return pipe.predict_noise_with_multi_branch_cfg(True, 3.0, branches), pipe.ran


def test_groups_of_a_larger_world_work_on_their_own():
    results = run_on_ranks(pairs, 4)
    assert [ran for _, ran in results] == [[0], [1], [10], [11]]
    for rank, (result, _) in enumerate(results):
        positive, negative = noise(2, 6, 8, seed=10 * (rank // 2)), noise(2, 6, 8, seed=10 * (rank // 2) + 1)
        assert same(result, negative + 3.0 * (positive - negative))


def foreign_group(rank: int, world_size: int) -> str:
    group = dist.new_group([0])
    try:
        Toy().set_cfg_parallel_group(group)
    except ValueError as error:
        return str(error)
    return "accepted"


def test_a_group_without_this_rank_is_refused():
    accepted, refused = run_on_ranks(foreign_group, 2)
    assert accepted == "accepted"
    assert "rank 1 is not in the group" in refused


# --- two branches


def two_branches(rank: int, world_size: int, guided: bool, options: dict[str, Any]) -> tuple[Any, list[int]]:
    pipe = Toy()
    negative = {"branch": 1} if guided else None
    return pipe.predict_noise_maybe_with_cfg(guided, 4.0, {"branch": 0}, negative, **options), pipe.ran


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("world_size", WORLDS)
def test_positive_and_negative(world_size, normalize):
    positive, negative = noise(2, 6, 8, seed=0)[:, :4], noise(2, 6, 8, seed=1)[:, :4]
    expected = (negative + 4.0 * (positive - negative)).contiguous()
    if normalize:
        expected = expected * (positive.norm(dim=-1, keepdim=True) / expected.norm(dim=-1, keepdim=True))
    options = {"cfg_normalize": normalize, "output_slice": 4}
    for rank, (result, ran) in enumerate(run_on_ranks(two_branches, world_size, True, options)):
        assert same(result, expected)
        assert ran == list(range(rank, 2, world_size))


def test_combined_predictions_are_normalized_by_default():
    result, _ = two_branches(0, 1, True, {})
    torch.testing.assert_close(result.norm(dim=-1), noise(2, 6, 8).norm(dim=-1))


@pytest.mark.parametrize("world_size", WORLDS)
def test_without_a_negative_branch_nothing_is_combined(world_size):
    for rank, (result, ran) in enumerate(run_on_ranks(two_branches, world_size, False, {})):
        assert same(result, noise(2, 6, 8))
        assert ran == ([0] if rank == 0 else [])


def test_guidance_without_negative_arguments_is_an_error():
    with pytest.raises(ValueError, match="needs negative_kwargs"):
        Toy().predict_noise_maybe_with_cfg(True, 4.0, {"branch": 0}, None)


# --- formulas


def test_zero_predictions_normalize_to_zero():
    positive, combined = noise(1, 3, 4), noise(1, 3, 4, seed=1)
    positive[:, 0], combined[:, 1] = 0, 0
    result = Toy().cfg_normalize_function(positive, combined)
    assert torch.equal(result[:, :2], torch.zeros(1, 2, 4))
    assert torch.equal(result[:, 2], combined[:, 2] * (positive[:, 2].norm() / combined[:, 2].norm()))
    zero = torch.zeros(1, 3, 4, dtype=torch.bfloat16)
    assert same(Toy().combine_cfg_noise(zero, zero, 4.0, True), zero)


def test_branches_chain_with_a_scale_for_each_pair():
    text, image, nothing = (noise(1, 2, 3, seed=i) for i in range(3))
    result = Toy().combine_multi_branch_cfg_noise([text, image, nothing], [5.0, 2.0])
    assert torch.equal(result, nothing + 2.0 * (image - nothing) + 5.0 * (text - image))


@pytest.mark.parametrize(("scale", "count"), [(4.0, 3), ([4.0], 3), ([4.0, 1.0], 2)])
def test_scales_that_do_not_fit_the_branches_are_an_error(scale, count):
    with pytest.raises(ValueError, match=f"{count} branches need {count - 1} scales"):
        Toy().combine_multi_branch_cfg_noise([noise(1, 2)] * count, scale)


def test_named_scales_need_a_formula_of_the_model():
    with pytest.raises(TypeError, match=r"\['text', 'image'\].*override combine_multi_branch_cfg_noise"):
        Toy().combine_multi_branch_cfg_noise([noise(1, 2)] * 3, {"text": 1.0, "image": 2.0})


def test_no_branches_are_an_error():
    with pytest.raises(ValueError, match="branches_kwargs is empty"):
        Toy().predict_noise_with_multi_branch_cfg(True, 1.0, [])


# --- failures


def fail_then_work(rank: int, world_size: int, bad: int) -> tuple[str, Any]:
    pipe = Failing(bad)
    try:
        pipe.predict_noise_with_multi_branch_cfg(True, [1.0, 1.0, 1.0], [{"branch": i} for i in range(4)])
    except Exception as error:
        pipe.bad = -1
        return f"{type(error).__name__}: {error}", pipe.predict_noise_maybe_with_cfg(False, 1.0, {"branch": 0}, None)
    return "no error", None


@pytest.mark.parametrize("bad", [0, 1, 3])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_failure_on_one_rank_is_raised_on_all_and_the_group_goes_on(world_size, bad):
    results = run_on_ranks(fail_then_work, world_size, bad, timeout=20)
    for rank, (message, after) in enumerate(results):
        owner = bad % world_size
        assert message.startswith(
            "KeyError" if rank == owner else f"RuntimeError: rank {owner} of the CFG group failed"
        )
        assert f"branch {bad} has no weights" in message
        assert torch.equal(after, noise(2, 3))


class NoTensor(Toy):
    def predict_noise(self, branch: int) -> Any:
        return "not a tensor" if branch else noise(2, 3)


def wrong_type(rank: int, world_size: int) -> str:
    with pytest.raises((TypeError, RuntimeError)) as caught:
        NoTensor().predict_noise_maybe_with_cfg(True, 2.0, {"branch": 0}, {"branch": 1})
    return str(caught.value)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_prediction_that_is_no_tensor_fails_on_all_ranks(world_size):
    expected = "must be a tensor or a tuple of tensors, got str"
    assert all(expected in message for message in run_on_ranks(wrong_type, world_size))


def uneven(rank: int, world_size: int) -> str:
    with pytest.raises(ValueError, match="different numbers") as caught:
        Toy().predict_noise_with_multi_branch_cfg(True, [1.0] * (1 + rank), [{"branch": 0}] * (2 + rank))
    return str(caught.value)


def test_ranks_that_disagree_on_the_branches_raise():
    assert all("[2, 3]" in message for message in run_on_ranks(uneven, 2))


# --- scheduler


class Noisy:
    """A scheduler that draws from the global generator and keeps a history, as some of diffusers do."""

    def __init__(self) -> None:
        self.history: list[Any] = []

    def step(self, prediction: Any, t: Any, latents: Any, return_dict: bool = True) -> tuple[torch.Tensor]:
        self.history.append(t)
        return (latents - t * prediction + torch.randn(latents.shape),)


class Composite:
    def step(self, predictions: Any, t: Any, latents: Any, return_dict: bool = True) -> tuple[Any]:
        return (tuple(x - t * p for p, x in zip(predictions, latents, strict=True)),)


def noisy_steps(rank: int, world_size: int, modalities: int) -> tuple[Any, int]:
    torch.manual_seed(rank)
    pipe = Toy()
    schedulers = tuple(Noisy() for _ in range(modalities))
    pipe.scheduler = schedulers if modalities > 1 else schedulers[0]
    latents = tuple(noise(2, 3 + i, seed=i) for i in range(modalities)) if modalities > 1 else noise(2, 3)
    for t in (0.5, 0.25):
        latents = pipe.scheduler_step_maybe_with_cfg(latents, t, latents, True)
    return latents, sum(len(scheduler.history) for scheduler in schedulers)


@pytest.mark.parametrize("modalities", [1, 2])
@pytest.mark.parametrize("world_size", WORLDS)
def test_latents_stay_equal_where_the_scheduler_draws_noise(world_size, modalities):
    state = torch.random.get_rng_state()
    expected, _ = noisy_steps(0, 1, modalities)
    torch.random.set_rng_state(state)
    for latents, steps in run_on_ranks(noisy_steps, world_size, modalities):
        assert same(latents, expected)
        assert steps == 2 * modalities


def test_each_modality_may_have_its_own_timestep_and_one_scheduler_may_take_all():
    pipe, latents = Toy(), (noise(2), noise(3))
    pipe.scheduler = Composite()
    stepped = pipe.scheduler_step_maybe_with_cfg(latents, 0.5, latents, False)
    assert same(stepped, tuple(0.5 * x for x in latents))
    pipe.scheduler = (Noisy(), Noisy())
    pipe.scheduler_step_maybe_with_cfg(latents, (0.5, 0.25), latents, False)
    assert [scheduler.history for scheduler in pipe.scheduler] == [[0.5], [0.25]]


class BadStep(Toy):
    def scheduler_step(self, noise_pred: Any, t: Any, latents: Any) -> Any:
        if dist.get_rank() == 1:
            raise MemoryError("no room for latents")
        return latents


def failing_step(rank: int, world_size: int) -> str:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        BadStep().scheduler_step_maybe_with_cfg(noise(2), 0, noise(2), True)
    return str(caught.value)


def test_a_failing_scheduler_step_is_raised_on_all_ranks():
    assert all("no room for latents" in message for message in run_on_ranks(failing_step, 3))


# --- validity


def validity(rank: int, world_size: int) -> list[bool]:
    return [Toy().check_cfg_parallel_validity(*case) for case in ((4.0, True), (1.0, True), (4.0, False))]


def test_validity_asks_for_a_scale_and_a_negative_prompt_on_several_ranks_only(caplog):
    assert run_on_ranks(validity, 1) == [[True, True, True]]
    assert run_on_ranks(validity, 2) == [[True, False, False]] * 2


# --- inside the engine


@pytest.fixture
def engine_thread():
    set_current_task("a task")
    yield
    set_current_task(None)


def deferred_branches(rank: int, world_size: int) -> Any:
    """Calls as the engine sees them: each returns a promise, and a wait resolves all that are pending."""
    pending: list[tuple[int, Source]] = []
    waits: list[int] = []

    def wait() -> None:
        waits.append(len(pending))
        for branch, source in pending:
            source.resolve((noise(2, 6, 8, seed=branch),))
        pending.clear()

    def transformer(branch: int) -> Deferred:
        source = Source(wait)
        pending.append((branch, source))
        return Deferred.of(source)

    pipe = Toy()
    pipe.transformer = transformer
    set_current_task("a task")
    try:
        branches = [{"branch": i} for i in range(3)]
        result = pipe.predict_noise_with_multi_branch_cfg(
            True, [2.0, 3.5], branches, cfg_normalize=True, output_slice=4
        )
        return plain(result), waits
    finally:
        set_current_task(None)


def test_inside_the_engine_all_branches_are_pending_before_any_is_computed():
    expected, _ = branches_of(Toy, 3, True, {"cfg_normalize": True, "output_slice": 4})
    for result, waits in run_on_ranks(deferred_branches, 2):
        assert same(result, expected)
        assert waits == [3]


def in_engine(rank: int, world_size: int) -> Any:
    """Only rank 0 calls anything: with a collective this would never end."""
    if rank:
        return None
    set_current_task("a task")
    pipe = Toy()
    pipe.scheduler = Noisy()
    result = pipe.predict_noise_maybe_with_cfg(True, 4.0, {"branch": 0}, {"branch": 1})
    pipe.scheduler_step_maybe_with_cfg(result, 1.0, result, True)
    assert pipe.check_cfg_parallel_validity(1.0, False)
    set_current_task(None)
    return pipe.ran


def test_inside_the_engine_there_is_no_collective():
    assert run_on_ranks(in_engine, 2, timeout=20) == [[0, 1], None]


def test_the_current_task_belongs_to_its_thread_and_does_not_nest(engine_thread):
    assert inside_engine()
    assert current_task() == "a task"
    with pytest.raises(AssertionError, match="do not nest"):
        set_current_task("another")
    set_current_task(None)
    assert not inside_engine()


# --- the guide


class QwenStyle(CFGParallelMixin):
    """The loop of the guide of vLLM-Omni, with all the arguments that it passes."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        shape = {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16}
        text = {"num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)}
        self.transformer = QwenImageTransformer2DModel(**shape, **text).eval()
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.scheduler.set_timesteps(3)
        self.forwards = 0
        self.transformer.register_forward_hook(self.count)

    def count(self, *_: Any) -> None:
        self.forwards += 1

    def diffuse(self, inputs: dict[str, Any], do_true_cfg: bool, true_cfg_scale: float, normalize: bool) -> Any:
        latents = inputs["latents"]
        self.transformer.do_true_cfg = do_true_cfg
        for t in self.scheduler.timesteps:
            timestep = t.expand(latents.shape[0]).to(device=latents.device, dtype=latents.dtype)
            common = {"hidden_states": latents, "timestep": timestep / 1000, "guidance": None}
            common["img_shapes"] = [[(1, 4, 4)]]
            noise_pred = self.predict_noise_maybe_with_cfg(
                do_true_cfg=do_true_cfg,
                true_cfg_scale=true_cfg_scale,
                positive_kwargs={**common, **inputs["positive"]},
                negative_kwargs={**common, **inputs["negative"]} if do_true_cfg else None,
                cfg_normalize=normalize,
            )
            latents = self.scheduler_step_maybe_with_cfg(noise_pred, t, latents, do_true_cfg)
        return latents


def prompt(length: int, seed: int) -> dict[str, Any]:
    """A prompt padded to 8 tokens; its length is told twice, as the guide does."""
    mask = (torch.arange(8) < length).long()[None]
    embeds = noise(1, 8, 32, seed=seed)
    return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask, "txt_seq_lens": [length]}


def qwen_inputs() -> dict[str, Any]:
    return {"latents": noise(1, 16, 16), "positive": prompt(8, 1), "negative": prompt(5, 2)}


@torch.no_grad()
def qwen(rank: int, world_size: int, do_true_cfg: bool, normalize: bool) -> tuple[torch.Tensor, int]:
    pipe = QwenStyle()
    return pipe.diffuse(qwen_inputs(), do_true_cfg, 4.0, normalize), pipe.forwards


@torch.no_grad()
def plain_qwen(do_true_cfg: bool, normalize: bool) -> torch.Tensor:
    """The same without the mixin: two calls in order, and the formula."""
    pipe, inputs = QwenStyle(), qwen_inputs()
    latents = inputs["latents"]

    def predict(t: torch.Tensor, text: dict[str, Any]) -> torch.Tensor:
        known = {name: value for name, value in text.items() if name != "txt_seq_lens"}
        return pipe.transformer(latents, timestep=t[None] / 1000, img_shapes=[[(1, 4, 4)]], **known)[0]

    for t in pipe.scheduler.timesteps:
        prediction = positive = predict(t, inputs["positive"])
        if do_true_cfg:
            negative = predict(t, inputs["negative"])
            prediction = negative + 4.0 * (positive - negative)
        if do_true_cfg and normalize:
            prediction = prediction * (positive.norm(dim=-1, keepdim=True) / prediction.norm(dim=-1, keepdim=True))
        latents = pipe.scheduler.step(prediction, t, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize(("do_true_cfg", "normalize"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_loop_of_the_guide_equals_a_sequential_loop(world_size, do_true_cfg, normalize):
    expected = plain_qwen(do_true_cfg, normalize)
    results = run_on_ranks(qwen, world_size, do_true_cfg, normalize)
    assert all(same(latents, expected) for latents, _ in results)
    count = 2 if do_true_cfg else 1
    assert [forwards for _, forwards in results] == [3 * len(range(r, count, world_size)) for r in range(world_size)]


def test_text_lengths_reach_a_model_that_takes_them_and_are_never_dropped_without_a_mask():
    pipe = Toy()
    pipe.transformer = lambda txt_seq_lens: (txt_seq_lens,)
    assert pipe.predict_noise(txt_seq_lens=[3]) == [3]
    pipe.transformer = lambda **kwargs: (kwargs,)
    masked = {"encoder_hidden_states_mask": 1, "txt_seq_lens": [3]}
    assert pipe.predict_noise(**masked) == masked
    pipe.transformer = lambda encoder_hidden_states_mask=None: (encoder_hidden_states_mask,)
    assert pipe.predict_noise(**masked) == 1
    with pytest.raises(TypeError, match="txt_seq_lens"):
        pipe.predict_noise(txt_seq_lens=[3])


def printed_under_torchrun(script: Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_program_of_our_guide_prints_the_same_under_torchrun(tmp_path, capsys):
    script = tmp_path / "guided.py"
    found = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert found is not None
    script.write_text(found[1])
    runpy.run_path(str(script))
    (number,) = re.findall(r"-?\d+\.\d+", capsys.readouterr().out)
    # Both ranks print to one pipe, and may do so at the same moment: their numbers stay whole, their lines may not.
    printed = printed_under_torchrun(script)
    assert printed.count(number) == 2
    assert not re.search(r"\d", printed.replace(number, ""))


# --- the pool of ranks itself


def process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def hang_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        time.sleep(60)
    dist.barrier()


def raise_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise LookupError("raised on one rank")
    dist.barrier()


def die_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def test_ranks_are_reused_and_survive_an_error():
    before = run_on_ranks(process_id, 2)
    with pytest.raises(LookupError, match="raised on one rank") as caught:
        run_on_ranks(raise_on_one, 2)
    assert "on rank 1 of 2" in caught.value.__notes__[0]
    assert "in raise_on_one" in caught.value.__notes__[0]
    assert run_on_ranks(process_id, 3)[:2] == before


def test_a_hang_shows_the_stacks_and_the_ranks_are_replaced():
    before = run_on_ranks(process_id, 2)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]") as caught:
        run_on_ranks(hang_on_one, 2, timeout=1)
    assert all("in hang_on_one" in note for note in caught.value.__notes__)
    assert not set(run_on_ranks(process_id, 2)) & set(before)


def test_a_dead_rank_is_reported_and_replaced():
    with pytest.raises(RuntimeError, match="rank 1 died, exit code 7"):
        run_on_ranks(die_on_one, 2)
    assert len(run_on_ranks(process_id, 2)) == 2
