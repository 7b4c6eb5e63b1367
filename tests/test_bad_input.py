"""Bad input through the real command line: exit code 2, one sentence with the field and the way out, no file left."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.cli import denoised, refused

pytestmark = [pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.checkpoint("qwen_image", tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(model, tmp_path / "model"))


# What is refused before a model is looked at: flags, and what the message must name.
EARLY = [
    ("--height 0", ("height=0", "at least 1")),
    ("--width -64", ("width=-64", "at least 1")),
    ("--height 12.5", ("--height", "integer")),
    ("--num-inference-steps 0", ("num_inference_steps=0", "at least 1")),
    ("--num-inference-steps 1000000000", ("num_inference_steps", "at most")),
    ("--num-images-per-prompt 0", ("num_outputs_per_prompt=0", "at least 1")),
    ("--num-images-per-prompt 1000000", ("num_outputs_per_prompt", "at most")),
    ("--guidance-scale nan", ("guidance_scale=nan", "finite")),
    ("--cfg-scale nan", ("cfg_scale=nan", "finite")),
    ("--cfg-scale inf", ("cfg_scale=inf", "finite")),
    ("--cfg-scale -1", ("cfg_scale=-1", "at least 0")),
    ("--guidance-scale-high nan", ("guidance_scale_high=nan", "finite")),
    ("--seed -1", ("seed=-1", "at least 0")),
    ("--seed 99999999999999999999999", ("seed", "at most")),
    ("--fps 0", ("fps=0", "at least")),
    ("--dtype int3", ("dtype='int3'", "bfloat16")),
    ("--cfg-parallel-size 0", ("cfg_parallel_size=0", "at least 1")),
    ("--sequence-parallel-size 4", ("sequence_parallel_size=4", "ulysses_degree")),
    ("--default-sampling-params [1]", ("--default-sampling-params", "JSON")),
    ('--default-sampling-params {"height":0}', ("default_sampling_params", "height=0", "at least 1")),
    ('--default-sampling-params {"hieght":64}', ("default_sampling_params", "'hieght'", "'height'")),
    ("--extra-args {", ("--extra-args", "JSON")),
    ('--extra-args {"height":0}', ("height=0", "at least 1")),
    ("--cfg-scale 1e300", ("cfg_scale=1e+300", "at most 1000")),
    ("--flow-shift 0", ("flow_shift=0", "at least 0.001")),
    ("--num-threads 100000", ("num_threads=100000", "at most")),
    ("--cfg-parallel-size 100000", ("cfg_parallel_size=100000", "at most")),
    ("--prompt again", ("--prompt", "once")),
    ("--hieght 64", ("--hieght", "--height")),
    ("--image nowhere.png", ("image='nowhere.png'", "no such file")),
    ("--model nowhere", ("model='nowhere'", "shapes")),
    ("--model ./nowhere/at/all", ("model='./nowhere/at/all'", "no folder")),
]


@pytest.mark.parametrize(("flags", "says"), EARLY, ids=[flags for flags, _ in EARLY])
def test_refused_before_loading(flags: str, says: tuple[str, ...], tmp_path: Path) -> None:
    message = refused(tmp_path, "a cat", "--output", tmp_path / "out.png", *flags.split())
    assert all(word in message for word in says), message


# Flags of features that are not there yet.
LONELY = [
    ("--vae-patch-parallel-size 2", "must divide the ranks"),
    ("--text-encoder-tp-size 2", "must divide the ranks"),
    ("--use-hsdp", "raise cfg_parallel_size"),
    ("--hsdp-shard-size 2", "use_hsdp=True"),
    ("--hsdp-replicate-size 2", "use_hsdp=True"),
    ("--enable-expert-parallel", "raise tensor_parallel_size"),
    ("--ulysses-mode advanced_uaa", "leave the mode out"),
    ("--enable-cpu-offload --enable-layerwise-offload", "choose one of them"),
    ("--quantization fp9", "must be one of fp8, int8, int8_weight_only, gguf"),
    ("--quantization gguf", "there are none; name it"),
    ("--quantization int8 --use-hsdp --cfg-parallel-size 2", "cannot go with use_hsdp=True"),
    ("--layerwise-num-gpu-layers 2", "acts with enable_layerwise_offload=True only"),
    ("--num-weight-load-threads 4 --disable-multithread-weight-load", "leave one out"),
    ("--enable-cpu-offload --use-hsdp --cfg-parallel-size 2", "leave it off with enable_cpu_offload"),
    ('--cache-config {"rel_l1_thresh":0.2}', "set cache_backend"),
    ("--lora-scale 0.5", "lora_scale acts with lora_path only"),
    ("--lora-path here", "is no file, no folder and no hub id"),
]


@pytest.mark.parametrize(("flags", "way_out"), LONELY)
def test_degrees_that_act_on_no_ranks_are_refused(flags: str, way_out: str, tmp_path: Path) -> None:
    assert way_out in refused(tmp_path, "a cat", "--output", tmp_path / "out.png", *flags.split())


OUTPUTS = ["out.bmp", "out", "nowhere/out.png", "/proc/out.png", "folder.png", "file.png/out.png"]


@pytest.mark.parametrize("output", OUTPUTS)
def test_unwritable_output_is_refused_before_loading(output: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file.png").touch()
    message = refused(tmp_path, "a cat", "--model", "nowhere", "--output", tmp_path / output)
    assert message.startswith("output=")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_the_right_to_write(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert "output=" in refused(tmp_path, "a cat", "--model", "nowhere", "--output", locked / "out.png")


# What only the loaded model can refuse.
LATE = [
    (["--height", 65], ("height=65", "multiple of", "use 64 or")),
    (["--width", 7], ("width=7", "multiple of")),
    (["--height", 1_000_000_000, "--width", 1_000_000_000], ("height x width", "max_pixels")),
    (["--height", 16 * 10**30], ("height", "max_pixels")),
    (["--prompt", "x" * 100_000], ("prompt has 100000 characters", "shorten")),
    (["--negative-prompt", "x" * 100_000], ("negative_prompt has 100000 characters", "shorten")),
    (["--prompt", "\udcff"], ("prompt holds bytes that are no text",)),
    (["--num-frames", 5], ("num_frames=5", "does not take it")),
    (["--fps", 30], ("fps=30", "makes no video")),
    (["--strength", 0.5], ("strength=0.5", "does not take it")),
    (["--extra-args", '{"no_such": 1}'], ("'no_such'", "extra_args")),
    (["--boundary-ratio", 0.5], ("boundary_ratio", "leave it out")),
    (["--cfg-scale", 4, "--true-cfg-scale", 3], ("cfg_scale=4", "true_cfg_scale=3", "one of them")),
    (["--guidance-scale-high", 4, "--guidance-scale", 3], ("guidance_scale_high=4", "no second expert")),
    (["--sigmas", "[]"], ("sigmas=[]", "at least one")),
    (["--sigmas", "[1.0, NaN]"], ("sigmas=[1.0, nan]", "finite")),
    (["--timesteps", '["a"]'], ("timesteps=['a']", "numbers")),
]


@pytest.mark.parametrize(("flags", "says"), LATE, ids=[str(flags)[:40] for flags, _ in LATE])
def test_refused_by_the_model(flags: list[object], says: tuple[str, ...], model: Path, tmp_path: Path) -> None:
    prompt = [] if "--prompt" in flags else ["--prompt", "a cat"]
    message = refused(tmp_path, "--model", model, "--output", tmp_path / "out.png", *prompt, *flags)
    assert all(word in message for word in says), message


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")  # the scheduler's
def test_a_black_picture_is_no_answer(model: Path, tmp_path: Path) -> None:
    """This scheduler stretches its schedule to a last sigma, which one step cannot have: it becomes NaN."""
    flags = ("--num-inference-steps", 1, "--height", 64, "--width", 64, "--output", tmp_path / "out.png")
    result = denoised("generate", "a cat", "--model", model, *flags)
    assert result.exit_code == 2
    assert "not finite; use more steps" in result.stderr.splitlines()[-1]  # after the progress bar
    assert not os.listdir(tmp_path)


def test_no_prompt(model: Path, tmp_path: Path) -> None:
    assert "prompt is missing" in refused(tmp_path, "--model", model, "--output", tmp_path / "out.png")


def test_output_of_another_kind(model: Path, tmp_path: Path) -> None:
    message = refused(tmp_path, "a cat", "--model", model, "--output", tmp_path / "out.mp4")
    assert "QwenImagePipeline makes images" in message


def test_images_that_are_none(model: Path, tmp_path: Path) -> None:
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("not an image")
    Image.new("RGB", (64, 64), "red").save(cut)
    cut.write_bytes(cut.read_bytes()[:-60])
    for image in (text, cut):
        message = refused(tmp_path, "a cat", "--model", model, "--output", tmp_path / "out.png", "--image", image)
        assert "no readable image" in message


def test_image_with_too_many_pixels(model: Path, tmp_path: Path) -> None:
    image = tmp_path / "in.png"
    Image.new("RGB", (64, 64)).save(image)
    flags = ("--output", tmp_path / "out.png", "--image", image, "--max-pixels", 1000)
    assert "64 x 64 pixels, more than max_pixels=1000" in refused(tmp_path, "a cat", "--model", model, *flags)


def _without_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()


def _index_no_json(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")


def _index_no_object(folder: Path) -> None:
    (folder / "model_index.json").write_text("[1, 2]")


def _unknown_class(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "_class_name": "NoSuchPipeline"}))


def _without_component(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def _without_config(folder: Path) -> None:
    (folder / "transformer" / "config.json").unlink()


def _missing_shard(folder: Path) -> None:
    weights = next((folder / "transformer").glob("*.safetensors"))
    names = list(load_file(weights))
    shards = dict.fromkeys(names, "diffusion_pytorch_model-00001-of-00002.safetensors")
    shards[names[-1]] = "diffusion_pytorch_model-00002-of-00002.safetensors"
    weights.rename(weights.with_name(shards[names[0]]))
    index = weights.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def _without_weights(folder: Path) -> None:
    next((folder / "vae").glob("*.safetensors")).unlink()


def _truncated(folder: Path) -> None:
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])


def _empty(folder: Path) -> None:
    next((folder / "text_encoder").glob("*.safetensors")).write_bytes(b"")


def _garbage(folder: Path) -> None:
    next((folder / "transformer").glob("*.safetensors")).write_bytes(os.urandom(5000))


def _edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})


def _wrong_shapes(folder: Path) -> None:
    _edit_weights(folder, lambda tensors: tensors.update({"img_in.weight": torch.zeros(3, 3)}))


def _missing_weight(folder: Path) -> None:
    _edit_weights(folder, lambda tensors: tensors.__delitem__("img_in.weight"))


def _pickled(folder: Path) -> None:
    weights = next((folder / "transformer").glob("*.safetensors"))
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()


DAMAGES = {
    _without_index: ("no model_index.json", "diffusers layout"),
    _index_no_json: ("model_index.json", "no readable JSON"),
    _index_no_object: ("model_index.json", "no JSON object"),
    _unknown_class: ("NoSuchPipeline",),
    _without_component: ("lacks the component 'vae'",),
    _without_config: ("transformer", "config.json"),
    _missing_shard: ("00002-of-00002.safetensors is missing", "download it again"),
    _without_weights: ("/vae holds no weights in safetensors",),
    _truncated: ("truncated", "download it again"),
    _empty: ("text_encoder", "truncated"),
    _garbage: ("transformer", "truncated"),
    _wrong_shapes: ("img_in.weight",),
    _missing_weight: ("lacks the weight img_in.weight", "download it again"),
    _pickled: ("/transformer holds no weights in safetensors",),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__.strip("_"))
def test_damaged_checkpoint(damage: Callable[[Path], None], copy: Path, tmp_path: Path) -> None:
    damage(copy)
    flags = ("--num-inference-steps", 1, "--height", 64, "--width", 64, "--output", tmp_path / "out.png")
    message = refused(tmp_path, "a cat", "--model", copy, *flags)
    assert all(word in message for word in DAMAGES[damage]), message


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is installed")
def test_processor_without_torchvision(tmp_path: Path) -> None:
    """Checkpoints of image-edit models name a processor of videos, too."""
    folder = tiny.checkpoint("qwen_image_edit", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index["processor"] = ["transformers", "Qwen2VLProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    videos = json.dumps({"video_processor_type": "Qwen2VLVideoProcessor"})
    (folder / "processor" / "video_preprocessor_config.json").write_text(videos)
    message = refused(tmp_path, "a cat", "--model", folder, "--output", tmp_path / "out.png")
    assert "pip install 'denoised[vision]'" in message


def test_hub_model_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(tmp_path, "a cat", "--model", "nobody/nothing", "--output", tmp_path / "out.png")
    assert "'nobody/nothing' cannot be loaded" in message


def test_ranks_in_other_processes_say_it_as_well(copy: Path, tmp_path: Path) -> None:
    _wrong_shapes(copy)
    flags = ("--cfg-parallel-size", 2, "--num-threads", 1, "--output", tmp_path / "out.png")
    assert "img_in.weight" in refused(tmp_path, "a cat", "--model", copy, *flags)


def test_built_in_model(tmp_path: Path) -> None:
    message = refused(tmp_path, "a red circle", "--height", 100, "--output", tmp_path / "out.png")
    assert "height=100" in message
