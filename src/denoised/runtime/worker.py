"""One rank: loads the model, then ticks its engine until it is told to stop.

Knows its channel and its process group, not who started it: a thread, a forked process and a rank of torchrun run this
same code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import functools
import importlib
import signal
import sys
import threading
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist

from denoised import env, hf
from denoised.config import EngineConfig
from denoised.errors import DenoisedError, InvalidConfigError, InvalidRequestError, one_line
from denoised.features import lora
from denoised.lora_request import LoRARequest
from denoised.runtime import adapters as files
from denoised.runtime import checkpoints, denoiser, footprint, load, model_info, rescue
from denoised.runtime.dispatch import Dispatch
from denoised.runtime.encoder_cache import EncoderCache
from denoised.runtime.engine import Engine
from denoised.runtime.failures import kind_of_text
from denoised.runtime.flights import Runway
from denoised.runtime.mesh import Mesh
from denoised.runtime.protocol import Channel, Command, Failed, RankSpec, Ready
from denoised.runtime.travels import Travels
from denoised.spec.registry import resolve
from denoised.steps import boards
from denoised.steps.current import current_task
from denoised.steps.wire import Wire

# An idle engine still ticks this often (seconds), so that a rank that died is noticed without a request.
HEARTBEAT = 5.0
# Collectives wait this long for a slow peer; a peer that died is noticed at once, by its closed connection.
PATIENCE = datetime.timedelta(hours=1)


def run_rank(spec: RankSpec, channel: Channel) -> None:
    """Serve until told to stop or until the channel closes. Errors go out as `Failed`."""
    owns_group = spec.world_size > 1 and not dist.is_initialized()
    try:
        engine = start(spec, channel)
        serve(engine, channel, speaks=spec.rank == 0 or spec.rendezvous == "env://")
        if owns_group:  # only after an orderly end: with a peer gone, this would wait for it
            dist.destroy_process_group()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the client is gone
    except Exception as error:
        by_user, by_settings = isinstance(error, DenoisedError), isinstance(error, InvalidConfigError)
        text = str(error) if by_user else _with_place(error)
        if kind_of_text(text) == "out_of_memory":
            text = rescue.with_advice(text, spec.config)
        _tell(channel, Failed(error=text, by_user=by_user, by_settings=by_settings))
    finally:
        if spec.world_size > 1:  # one rank alone may share its process with other engines
            boards.leave()


def start(spec: RankSpec, channel: Channel) -> Engine:
    """Join the group, load the model, build the engine, and say that this rank is ready."""
    started = time.perf_counter()
    _show_stacks_on_signal()
    env.keep_pages()
    _import_plugins(spec)
    torch.set_num_threads(spec.config.num_threads or env.default_threads(spec.local_world_size))
    device = device_of(spec)
    mesh = _connect(spec, device)
    pipeline = load.load(spec.config, device=device, unread=mesh is not None or load.reads_late(spec.config, device))
    hf.route_warnings(_note)
    model_spec = resolve(pipeline)
    fingerprint = checkpoints.to_fingerprint(pipeline)
    info = model_info.describe(
        pipeline,
        model_spec,
        model=_model_name(spec.config),
        device=device,
        dtype=_dtype_of(pipeline, model_spec.denoisers),
        defaults={**load.default_sampling_params(spec.config.model), **spec.config.default_sampling_params},
    )
    info = dataclasses.replace(info, footprint=footprint.measure(pipeline, info, spec.config))
    sites = lora.survey(pipeline, model_spec.denoisers)
    guidance = denoiser.build(pipeline, model_spec, spec.config, mesh, sites)
    wire = _wire(mesh, device)
    adapters = _adapters(sites, spec.config, device, wire)
    channel.send(Ready(info=info, seconds=time.perf_counter() - started))
    return Engine(
        runway=Runway(
            pipeline,
            model_spec,
            info,
            fingerprint(),
            adapters,
            sees_all=guidance.placement.num_ranks == 1,
            caches=spec.config.caches,
        ),
        info=info,
        guidance=guidance,
        cache=EncoderCache(spec.config.encoder_cache_mb * 2**20),
        wire=wire,
        axes=spec.config.parallel_config.axes,
        dispatch=Dispatch(
            guidance,
            world_size=spec.world_size,
            join=not spec.config.deterministic,
            max_rows=denoiser.MAX_JOINED_ROWS,
            num_stages=spec.config.parallel_config.pipeline_parallel_size,
            max_elements=_agreed(footprint.max_elements(info.footprint), wire),
            travels=Travels(wire if spec.config.parallel_config.deals_components else None),
        ),
        entangled=spec.config.parallel_config.is_entangled,
        advised=functools.partial(rescue.advised, config=spec.config),
    )


def _adapters(sites: lora.Sites, config: EngineConfig, device: str, wire: Wire | None) -> lora.Adapters:
    """What holds the adapters of requests; that of the settings is active from here on. Raises InvalidConfigError."""
    adapters = lora.Adapters(
        sites,
        device=torch.device(device),
        max_adapters=config.max_loras,
        max_bytes=None if config.max_lora_mb is None else config.max_lora_mb * 2**20,
        **({"gather": wire.gather_objects} if wire is not None else {}),
    )
    if config.lora_path is not None:
        try:
            asked = LoRARequest(config.lora_path, lora_path=config.lora_path, scale=config.lora_scale)
            adapters.start_with(files.resolve(asked))
        except InvalidRequestError as error:
            raise InvalidConfigError(str(error).replace("lora_request=", "lora_path=", 1)) from error
    return adapters


def _agreed(elements: float, wire: Wire | None) -> float:
    """The least of all ranks: they choose alike only by equal numbers."""
    return elements if wire is None else min(wire.gather_objects(elements))


def _show_stacks_on_signal() -> None:
    """`kill -USR1` of a rank's process writes where it stands, also within a collective. Not in a user's process."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGUSR1"):
        faulthandler.register(signal.SIGUSR1, all_threads=True)


def serve(engine: Engine, channel: Channel, *, speaks: bool) -> None:
    """Tick until stopped. On rank 0 an idle engine sleeps in its channel; the others sleep in the header exchange.

    All ranks have all outputs. `speaks` says whether this one hands them on: rank 0, and under torchrun every rank,
    since each has its own copy of the user's program.
    """

    def commands(wait: bool) -> list[Command]:
        return _received(channel, timeout=HEARTBEAT if wait else 0.0)

    while not engine.stopped:
        for event in engine.tick(commands):
            if speaks:
                channel.send(event)


def _received(channel: Channel, timeout: float) -> list[Command]:
    commands: list[Command] = []
    while channel.poll(0.0 if commands else timeout):
        commands.append(channel.recv())
    return commands


def _import_plugins(spec: RankSpec) -> None:
    """Modules of the user that this rank needs before it loads: own pipeline classes, own components."""
    sys.path.extend(path for path in spec.import_path if path not in sys.path)
    for name in spec.config.plugins:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InvalidConfigError(f"plugins={name!r} cannot be imported: {one_line(error)}") from error


def device_of(spec: RankSpec) -> str:
    """The accelerator of this rank, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    torch.cuda.set_device(spec.local_rank)
    return f"cuda:{spec.local_rank}"


def _connect(spec: RankSpec, device: str) -> Mesh | None:
    """The group and mesh of all ranks; None where there is one."""
    if spec.world_size == 1:
        return None
    kind = device.split(":")[0]
    if not dist.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=spec.rendezvous, rank=spec.rank, world_size=spec.world_size, timeout=PATIENCE
        )
    return Mesh(spec.config.parallel_config, device=kind, timeout=PATIENCE)


def _wire(mesh: Mesh | None, device: str) -> Wire | None:
    if mesh is None:
        return None
    return Wire(control=mesh.control, data=mesh.group("cfg"), device=torch.device(device))


def _dtype_of(pipeline: Any, denoisers: tuple[str, ...]) -> str:
    """What the denoiser's weights really are: a pipeline object comes as it is."""
    dtype = next((getattr(pipeline, name).dtype for name in denoisers), torch.get_default_dtype())
    return str(dtype).removeprefix("torch.")


def _note(text: str) -> bool:
    """A pipeline's warning goes into the receipt of the request that it is about."""
    task = current_task()
    if task is not None:
        task.note(text)
    return task is not None


def _model_name(config: EngineConfig) -> str:
    return config.model if isinstance(config.model, str) else type(config.model).__name__


def _with_place(error: Exception) -> str:
    """The error and where it was raised, for failures that are ours and not the user's."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{one_line(error)} ({last.filename.rsplit('/', 2)[-1]}:{last.lineno})"


def _tell(channel: Channel, event: Any) -> None:
    with contextlib.suppress(OSError):  # nobody is left to tell
        channel.send(event)
