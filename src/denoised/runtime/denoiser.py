"""The order of everything that wraps the denoiser call, written once.

Features are applied innermost first. Those that this version has:

    expert     1  experts dealt whole, and marked so that tensor leaves them alone
    tensor     1  plain local shards; all later features see ordinary Linears
    quantize   2  other tensors as weights, made of the shards when those are read
    lora       3  stand-ins for layers' forwards, which add what a request brings; its part follows from the layer's
    compile    4  block bodies, compiled before the first request; what stands around blocks stays outside the graph
    pipeline   5  blocks of other stages: forward replaced, weights dropped, module kept in place
    shard      6  decides where weights live: FSDP2 per block
    offload    6  or on the device only while they are needed; its gates stand inside of what pipeline makes of blocks
               -  what is still needed of the weights is read from the files, unless one of these two reads them
    cache      7  may skip a range of blocks; ranks that share a forward decide alike, the state is the request's
    sequence   8  split at the plan's inputs, gather at its outputs, exchange inside attention; silence is an error
    attention  8  a kernel by name computes what is left after the exchange
    guidance   9  deals rows to the cfg axis, joins rows of requests
    trap      10  outermost: a task stops here

What a model refuses, it refuses before the first weight is read: all that cuts goes first, for all components, and the
later features are asked (`check`) without being applied.

The numbers are the places of the full order in docs/architecture.md; a feature that lands takes its line here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from denoised import hf
from denoised.attention.backends import Backend
from denoised.config import DiffusionParallelConfig, EngineConfig
from denoised.errors import InvalidConfigError
from denoised.features import attention_backend, compile, expert, hsdp, pipeline, sequence, tensor, vae_patch
from denoised.features.guidance import Guidance
from denoised.features.lora import Sites
from denoised.features.offload import Offload
from denoised.runtime import caching, quantizing, warming, weights
from denoised.runtime.load import num_load_threads
from denoised.runtime.mesh import Mesh
from denoised.runtime.offloading import offload_of
from denoised.runtime.planning.reading import block_costs
from denoised.spec.model_spec import ModelSpec
from denoised.steps.rows import RowRules
from denoised.steps.trap import install, targets_of

MAX_JOINED_ROWS = 16


def build(pipe: Any, spec: ModelSpec, config: EngineConfig, mesh: Mesh | None, sites: Sites | None = None) -> Guidance:
    """Wrap a pristine pipeline's components in place; gives what runs its denoiser calls. `mesh`: None for one rank.

    sites: where adapters may act, surveyed before; stand-ins go there, inside of all later places.

    Raises:
        InvalidConfigError: a feature is asked for that cannot act on this model.
    """
    stages: dict[str, pipeline.Stages] = {}
    caching.check(pipe, spec, config)
    attends = _attention(pipe, spec, config)
    quantizing.check(pipe, spec, config)
    offload = offload_of(pipe, spec, config)
    first = mesh is None or mesh.rank == 0
    bodies = _bodies(pipe, spec, config, says=first)
    if mesh is not None:
        stages = _divide(pipe, spec, config.parallel_config, mesh, offload, bodies)
    elif bodies is not None:
        for name in spec.denoisers:
            compile.apply(getattr(pipe, name), spec, bodies)
    quantizing.apply(pipe, spec, config)
    if sites is not None:
        sites.prepare()
    _place(pipe, spec, config, mesh, offload, stages)
    for name, backend in attends.items():
        attention_backend.apply(getattr(pipe, name), backend, name)
    rules = row_rules(spec)
    if bodies is not None:
        warming.warm(pipe, spec, config, bodies, device=_computes_on(), rules=rules, says=first)
    guidance = Guidance(
        rules=lambda call: rules,
        num_ranks=mesh.axes["cfg"] if mesh is not None else 1,
        rank=mesh.coordinate("cfg") if mesh is not None else 0,
        join=not config.deterministic,
        max_rows=MAX_JOINED_ROWS,
        sticky=config.caches,
        lockstep=config.parallel_config.use_hsdp,
        entangled=config.parallel_config.is_entangled,
        stages=stages,
    )
    trap(pipe, spec)
    return guidance


def _divide(
    pipe: Any,
    spec: ModelSpec,
    parallel: DiffusionParallelConfig,
    mesh: Mesh,
    offload: Offload | None,
    bodies: compile.Bodies | None,
) -> dict[str, pipeline.Stages]:
    """All that needs no weight's value, and all that can be refused: nothing has been read when this returns.

    Gives the stages of denoisers that are cut into some.
    """
    _check_denoisers(spec, parallel)
    stages: dict[str, pipeline.Stages] = {}
    costs = block_costs(pipe, spec) if mesh.axes["pipeline"] > 1 else {}
    for name in spec.denoisers:
        stages |= _cut_denoiser(name, getattr(pipe, name), spec, parallel, mesh, offload, bodies, costs.get(name))
    _cut_encoders(pipe, spec, parallel, mesh)
    if parallel.vae_patch_parallel_size > 1:
        vae_patch.apply(_vae(pipe, spec), mesh.neighbours(parallel.vae_patch_parallel_size))
    return stages


def _cut_denoiser(
    name: str,
    model: nn.Module,
    spec: ModelSpec,
    parallel: DiffusionParallelConfig,
    mesh: Mesh,
    offload: Offload | None,
    bodies: compile.Bodies | None,
    costs: Sequence[float] | None,
) -> dict[str, pipeline.Stages]:
    """costs: of its blocks, by which stages are cut; None: their weights."""
    stages: dict[str, pipeline.Stages] = {}
    if parallel.enable_expert_parallel:
        expert.apply(model, spec, tensor=mesh.group("tensor"), sequence=mesh.span("ring", "ulysses"))
    if mesh.axes["tensor"] > 1:
        tensor.apply(model, spec, mesh.group("tensor"))
    if bodies is not None:
        compile.apply(model, spec, bodies)
    if offload is not None:
        offload.gate(model)
    if mesh.axes["pipeline"] > 1:
        # Ranks gather weights in one order, which rows that take turns would not keep.
        rounds = 1 if parallel.use_hsdp else pipeline.MAX_ROUNDS
        stages[name] = pipeline.apply(model, spec, mesh.group("pipeline"), costs=costs, max_rounds=rounds)
    if parallel.use_hsdp:
        hsdp.check(model, mesh.equal_weights(num_copies=parallel.hsdp_replicate_size))
    sequence.check(model, spec, **_sequence_groups(mesh), mode=parallel.ulysses_mode)
    return stages


def _cut_encoders(pipe: Any, spec: ModelSpec, parallel: DiffusionParallelConfig, mesh: Mesh) -> None:
    encoders = hf.text_encoders(pipe)
    if parallel.text_encoder_tp_size > 1 and not encoders:
        raise InvalidConfigError(
            f"text_encoder_tp_size={parallel.text_encoder_tp_size}: {spec.pipeline} has no text encoder; leave it "
            "at 1."
        )
    for name, encoder in encoders.items():
        if parallel.text_encoder_tp_size > 1:
            tensor.apply_encoder(encoder, mesh.neighbours(parallel.text_encoder_tp_size), name=name)
        if parallel.use_hsdp:
            hsdp.check(encoder, mesh.equal_weights(num_copies=parallel.hsdp_replicate_size))


def _place(
    pipe: Any,
    spec: ModelSpec,
    config: EngineConfig,
    mesh: Mesh | None,
    offload: Offload | None,
    stages: dict[str, pipeline.Stages],
) -> None:
    """Read the weights that this rank keeps, and what goes on top of them."""
    parallel, denoisers = config.parallel_config, {name: getattr(pipe, name) for name in spec.denoisers}
    gathers: dict[str, hsdp.Gathers] = {}
    if parallel.use_hsdp and mesh is not None:
        shards = mesh.equal_weights(num_copies=parallel.hsdp_replicate_size)
        gathers = {name: hsdp.apply(model, spec, shards, weights.fill) for name, model in denoisers.items()}
        for encoder in hf.text_encoders(pipe).values():
            hsdp.apply(encoder, None, shards, weights.fill)
    if offload is None:
        first = mesh is None or mesh.rank == 0
        weights.fill_all(modules(pipe), threads=num_load_threads(config, _device(pipe)), progress=first)
    else:
        offload.place(list(dict.fromkeys(modules(pipe))), list(denoisers.values()))
    caching.apply(pipe, spec, config, mesh, gathers=gathers, stages=stages)
    if mesh is not None:
        for model in denoisers.values():
            sequence.apply(model, spec, **_sequence_groups(mesh), mode=parallel.ulysses_mode)


def _attention(pipe: Any, spec: ModelSpec, config: EngineConfig) -> dict[str, Backend]:
    """Components whose attention has a kernel by name."""
    chosen = attention_backend.choice(config.attention_backend, spec.denoisers)
    device, ring = torch.device(_computes_on()), config.parallel_config.ring_degree
    return attention_backend.check(hf.components(pipe), chosen, device=device, ring_degree=ring)


def _bodies(pipe: Any, spec: ModelSpec, config: EngineConfig, *, says: bool) -> compile.Bodies | None:
    """Where compiled bodies go; None: blocks run as they are written, as by default do those of a CPU."""
    if not warming.is_asked(config, _computes_on()):
        if says:
            warming.tell(config, _computes_on())
        return None
    by_default = config.enforce_eager is None and not config.compile_shapes
    models = [getattr(pipe, name) for name in spec.denoisers]
    if by_default and not (models and all(compile.has_blocks(model, spec) for model in models)):
        return None
    if not models:
        raise InvalidConfigError(f"enforce_eager=False: {spec.pipeline} has no denoiser to compile; leave it out.")
    return compile.Bodies()


def _computes_on() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _sequence_groups(mesh: Mesh) -> dict[str, Any]:
    return {"ring": mesh.group("ring"), "ulysses": mesh.group("ulysses")}


def _device(pipe: Any) -> str:
    return next((p.device.type for part in modules(pipe) for p in part.parameters()), "cpu")


def _vae(pipe: Any, spec: ModelSpec) -> nn.Module:
    vae = getattr(pipe, "vae", None)
    if not isinstance(vae, nn.Module):
        raise InvalidConfigError(
            f"vae_patch_parallel_size: {spec.pipeline} has no component named vae; use vae_patch_parallel_size=1."
        )
    return vae


def modules(pipe: Any) -> Iterator[nn.Module]:
    """All components with weights."""
    return (part for part in hf.components(pipe).values() if isinstance(part, nn.Module))


def _check_denoisers(spec: ModelSpec, parallel: DiffusionParallelConfig) -> None:
    if spec.reads_modules:
        raise InvalidConfigError(
            f"{parallel.formula()}: after each call {spec.pipeline} reads attention maps off its modules, which other "
            "ranks do not have; use one rank."
        )
    if spec.denoisers:
        return
    asked = [name for name, size in parallel.axes.items() if size > 1]
    raise InvalidConfigError(
        f"{parallel.formula()}: {spec.pipeline} has no component named transformer or unet for the axes "
        f"{', '.join(asked)} to act on; use one rank."
    )


def row_rules(spec: ModelSpec) -> RowRules:
    """What the spec says about rows, in the words of `steps`."""
    return RowRules(
        shared=spec.shared,
        lists=spec.row_lists,
        dims=spec.row_dims,
        folded=spec.row_folds,
        padded=spec.padded,
        whole=spec.whole_calls,
        trusted=spec.declared,
    )


def trap(pipe: Any, spec: ModelSpec) -> None:
    """Make tasks stop at every component call of this pipeline."""
    components = hf.components(pipe)
    for target in list(targets_of(components, spec.denoisers, rows_in=spec.rows_in, stores=spec.stores)):
        install(components[target.name], target)
