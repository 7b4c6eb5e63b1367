"""Classifier-free guidance over several ranks, for people who write their own pipeline.

A pipeline inherits `CFGParallelMixin`, hands the keyword arguments of its guidance branches to
`predict_noise_maybe_with_cfg` (two branches) or `predict_noise_with_multi_branch_cfg` (any number), and steps its
scheduler with `scheduler_step_maybe_with_cfg`. What both return is valid and equal, bit for bit, on every rank.

Where the branches run:

- alone in a process: here, in order;
- under torchrun, with torch.distributed initialised: branch i on rank i mod n of the group of
  `set_cfg_parallel_group`, by default of all ranks;
- inside the engine: all are called here, in order, and without a collective. `self.transformer` returns deferred
  predictions there, and the engine deals them to ranks.

This file does not know what a model or a scheduler is. Guide: docs/cfg_parallel_mixin.md.
"""

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from denoised.models.branch_exchange import Outputs, exchange
from denoised.steps.current import inside_engine
from denoised.steps.deferred import Deferred

logger = logging.getLogger(__name__)

Prediction: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]
"""What a branch predicts: a tensor [batch, sequence, ...], or one for each modality (video, audio)."""
Scale: TypeAlias = float | torch.Tensor
Branch: TypeAlias = Mapping[str, Any]


class CFGParallelMixin:
    """Guidance branches dealt to ranks, combined and stepped alike on all of them.

    To override, where a model needs it: `predict_noise`, `combine_cfg_noise`, `combine_multi_branch_cfg_noise`,
    `cfg_normalize_function`, `scheduler_step`. Every rank of the group makes the same calls with the same arguments.
    """

    transformer: Any
    scheduler: Any
    cfg_group: dist.ProcessGroup | None = None
    """The ranks that share the branches. None: all ranks, where torch.distributed is initialised."""

    def set_cfg_parallel_group(self, group: dist.ProcessGroup | None) -> None:
        """Choose the ranks that share the branches of this pipeline; None goes back to all ranks.

        Raises:
            ValueError: this rank is not in the group, so it would wait for ever.
        """
        if group is not None and dist.get_rank(group) < 0:
            raise ValueError(f"rank {dist.get_rank()} is not in the group: pass the group that holds this rank")
        self.cfg_group = group

    def predict_noise_maybe_with_cfg(
        self,
        do_true_cfg: bool,
        true_cfg_scale: Scale,
        positive_kwargs: Branch,
        negative_kwargs: Branch | None,
        cfg_normalize: bool = True,
        output_slice: int | None = None,
    ) -> Prediction:
        """Predict with a positive and a negative branch, combined by `combine_cfg_noise`.

        Args:
            do_true_cfg: False: the positive branch alone, uncombined.
            true_cfg_scale: weight of the difference between the branches.
            positive_kwargs: arguments of `predict_noise`, with the prompt.
            negative_kwargs: the same with the negative prompt; may be None where do_true_cfg is False.
            cfg_normalize: give each combined token the norm of the positive one.
            output_slice: keep only the first so many positions of dim 1 (the rest belong to an editing model's input).

        Returns:
            What `predict_noise` returns, equal on all ranks; a tuple of one counts as its tensor.

        Raises:
            ValueError: guidance without negative_kwargs.
            RuntimeError: a branch failed on another rank; the rank where it did raises the error itself.
        """
        if not do_true_cfg:
            return self._predict_branches([positive_kwargs], output_slice)[0]
        if negative_kwargs is None:
            raise ValueError("do_true_cfg=True needs negative_kwargs, got None")
        positive, negative = self._predict_branches([positive_kwargs, negative_kwargs], output_slice)
        return self.combine_cfg_noise(positive, negative, true_cfg_scale, cfg_normalize)

    def predict_noise_with_multi_branch_cfg(
        self,
        do_true_cfg: bool,
        true_cfg_scale: Any,
        branches_kwargs: Sequence[Branch],
        cfg_normalize: bool = False,
        output_slice: int | None = None,
    ) -> Prediction:
        """Predict with any number of branches, combined by `combine_multi_branch_cfg_noise`.

        Args:
            do_true_cfg: False: the first branch alone, uncombined.
            true_cfg_scale: passed on as it is; the default combination takes a number for two branches or a sequence.
            branches_kwargs: arguments of `predict_noise` for each branch, the positive one first.
            cfg_normalize: give each combined token the norm of the positive one.
            output_slice: keep only the first so many positions of dim 1.

        Returns:
            What `predict_noise` returns, equal on all ranks; a tuple of one counts as its tensor.

        Raises:
            ValueError: no branch, or branches that differ in number between ranks.
            RuntimeError: a branch failed on another rank; the rank where it did raises the error itself.
        """
        if not branches_kwargs:
            raise ValueError("branches_kwargs is empty: give the positive branch at least")
        if not do_true_cfg:
            return self._predict_branches(branches_kwargs[:1], output_slice)[0]
        predictions = self._predict_branches(branches_kwargs, output_slice)
        return self.combine_multi_branch_cfg_noise(predictions, true_cfg_scale, cfg_normalize)

    def predict_noise(self, *args: Any, **kwargs: Any) -> Prediction:
        """One forward of one branch: the transformer's first output. Override it for several modalities: a tuple."""
        prediction: Prediction = self.transformer(*args, **_without_text_lengths(self.transformer, kwargs))[0]
        return prediction

    def combine_cfg_noise(
        self,
        positive_noise_pred: Prediction,
        negative_noise_pred: Prediction,
        true_cfg_scale: Scale,
        cfg_normalize: bool = False,
    ) -> Prediction:
        """negative + scale * (positive - negative), for each modality."""
        return self._combine([positive_noise_pred, negative_noise_pred], [true_cfg_scale], cfg_normalize)

    def combine_multi_branch_cfg_noise(
        self, predictions: Sequence[Prediction], true_cfg_scale: Any, cfg_normalize: bool = False
    ) -> Prediction:
        """Chain the branches: the last, plus scale i times (branch i - branch i + 1), for each modality.

        Three branches [all, image only, nothing] with the scales [text, image] give
        nothing + image * (image only - nothing) + text * (all - image only). A model with another formula, or with
        scales that have names, overrides this.

        Args:
            predictions: one for each branch, the positive one first.
            true_cfg_scale: a number for two branches; otherwise a sequence, one fewer than branches.
            cfg_normalize: give each combined token the norm of the positive one.

        Raises:
            ValueError: the number of scales does not fit the branches.
            TypeError: scales with names, of which the default cannot know the order.
        """
        return self._combine(predictions, _scales_of(true_cfg_scale, len(predictions)), cfg_normalize)

    def cfg_normalize_function(self, noise_pred: torch.Tensor, comb_pred: torch.Tensor) -> torch.Tensor:
        """Give each token of comb_pred the norm it has in noise_pred; zero stays zero. Both are [..., channels]."""
        positive_norm = torch.norm(noise_pred, dim=-1, keepdim=True)
        combined_norm = torch.norm(comb_pred, dim=-1, keepdim=True)
        # No `if`: inside the engine these are recorded, and looking at a value would compute it too early.
        divisor = torch.where(combined_norm > 0, combined_norm, 1.0)
        normalized: torch.Tensor = comb_pred * (positive_norm / divisor)
        return normalized

    def scheduler_step(self, noise_pred: Prediction, t: Any, latents: Prediction) -> Prediction:
        """One step of `self.scheduler`, here and without a collective.

        With several modalities `self.scheduler` is either a tuple of schedulers, one for each (t may then be a tuple
        too), or one object whose `step` takes the tuples.
        """
        if not isinstance(self.scheduler, (tuple, list)):
            stepped: Prediction = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]
            return stepped
        times = t if isinstance(t, (tuple, list)) else [t] * len(self.scheduler)
        parts = zip(self.scheduler, noise_pred, times, latents, strict=True)
        return tuple(scheduler.step(*part, return_dict=False)[0] for scheduler, *part in parts)

    def scheduler_step_maybe_with_cfg(
        self, noise_pred: Prediction, t: Any, latents: Prediction, do_true_cfg: bool
    ) -> Prediction:
        """Step the scheduler; the latents are equal on all ranks afterwards, also where the scheduler draws noise.

        Every rank steps, because a scheduler keeps a history, and all go on with the latents of rank 0.

        Args:
            noise_pred: as `predict_noise_maybe_with_cfg` returned it.
            t: the timestep, or a tuple of them.
            latents: of the shape of noise_pred, or a tuple of such.
            do_true_cfg: has no effect: latents are equal with and without guidance.

        Raises:
            RuntimeError: the step failed on another rank; the rank where it did raises the error itself.
        """
        group = self._active_group()
        if group is None:
            return self.scheduler_step(noise_pred, t, latents)
        (stepped,) = exchange(group, lambda: [_as_tuple(self.scheduler_step(noise_pred, t, latents))], num_items=1)
        return _unwrap(stepped)

    def check_cfg_parallel_validity(self, true_cfg_scale: float, has_neg_prompt: bool) -> bool:
        """Whether a second branch will exist for the other ranks; True with one rank. If not, says why in the log."""
        if self._active_group() is None or (true_cfg_scale > 1 and has_neg_prompt):
            return True
        reason = "no negative prompt" if true_cfg_scale > 1 else f"true_cfg_scale={true_cfg_scale} is not over 1"
        logger.warning("CFG parallel has one branch only, the other ranks will wait: %s", reason)
        return False

    def _active_group(self) -> dist.ProcessGroup | None:
        """The group to exchange with; None where this rank does, or calls, everything itself."""
        if inside_engine() or not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD if self.cfg_group is None else self.cfg_group
        return group if dist.get_world_size(group) > 1 else None

    def _predict_branches(self, branches: Sequence[Branch], output_slice: int | None) -> list[Prediction]:
        """The predictions of all branches, in order, on every rank."""
        group = self._active_group()
        first, stride = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

        def run() -> list[Outputs]:
            # All calls come first: inside the engine a prediction is deferred, and touching it might compute it.
            outputs = [_as_tuple(self.predict_noise(**branch)) for branch in branches[first::stride]]
            return [tuple(_cut(tensor, output_slice) for tensor in output) for output in outputs]

        outputs = run() if group is None else exchange(group, run, num_items=len(branches))
        return [_unwrap(output) for output in outputs]

    def _combine(self, predictions: Sequence[Prediction], scales: Sequence[Scale], normalize: bool) -> Prediction:
        modalities = zip(*map(_as_tuple, predictions), strict=True)
        combined = [(branches[0], _chain(branches, scales)) for branches in modalities]
        return _unwrap(tuple(self.cfg_normalize_function(*pair) if normalize else pair[1] for pair in combined))


def _chain(branches: Sequence[torch.Tensor], scales: Sequence[Scale]) -> torch.Tensor:
    result = branches[-1]
    for i in reversed(range(len(scales))):
        result = result + scales[i] * (branches[i] - branches[i + 1])
    return result


def _scales_of(scale: Any, num_branches: int) -> Sequence[Scale]:
    """One scale for each pair of neighbours among the branches."""
    if isinstance(scale, Mapping):
        raise TypeError(
            f"true_cfg_scale names its scales {list(scale)}: override combine_multi_branch_cfg_noise to say what each"
            " weighs, or pass a sequence"
        )
    if not isinstance(scale, Sequence):
        # One branch has nothing to weigh: the scale that a pipeline passes anyway is no error.
        scale = [scale] if num_branches > 1 else []
    if len(scale) != num_branches - 1:
        raise ValueError(f"{num_branches} branches need {num_branches - 1} scales, got true_cfg_scale={scale}")
    return list(scale)


def _without_text_lengths(transformer: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Drop txt_seq_lens for a model that has no such argument and reads the lengths off the mask.

    vLLM-Omni's Qwen-Image takes both, and its guide passes both; the class of diffusers 0.42 takes the mask alone.
    Without a mask the lengths are not redundant, so the model's own TypeError stands.
    """
    redundant = kwargs.get("txt_seq_lens") is None or kwargs.get("encoder_hidden_states_mask") is not None
    if "txt_seq_lens" not in kwargs or not redundant:
        return kwargs
    parameters = inspect.signature(getattr(transformer, "forward", transformer)).parameters.values()
    if any(p.name == "txt_seq_lens" or p.kind is p.VAR_KEYWORD for p in parameters):
        return kwargs
    return {name: value for name, value in kwargs.items() if name != "txt_seq_lens"}


def _as_tuple(prediction: Prediction) -> Outputs:
    if isinstance(prediction, Deferred) and prediction.is_call_result:
        return tuple(prediction)  # an override that returns all of the transformer's outputs
    return prediction if isinstance(prediction, tuple) else (prediction,)


def _unwrap(outputs: Outputs) -> Prediction:
    return outputs[0] if len(outputs) == 1 else outputs


def _cut(tensor: torch.Tensor, output_slice: int | None) -> torch.Tensor:
    if not hasattr(tensor, "contiguous"):  # and not isinstance: it may be a deferred tensor
        raise TypeError(f"a prediction must be a tensor or a tuple of tensors, got {type(tensor).__name__}")
    # Contiguous also on one rank: a tensor that has travelled is, and a norm over other strides may round otherwise.
    return (tensor if output_slice is None else tensor[:, :output_slice]).contiguous()
