"""A Qwen 2.5-VL processor that does not need torchvision.

The library's `Qwen2VLProcessor` insists on a video processor, which exists only with torchvision, and torchvision has
no build for a CPU torch. None of the pipelines shows the processor a video. So the checkpoints name the class below
instead: `model_index.json` may name a class of any module that can be imported. Nothing is patched, the pipeline
classes stay as they are, and a spawned rank needs no preparation but `tests` on its path.
"""

from transformers import GlmImageProcessor, PreTrainedTokenizerBase, ProcessorMixin, Qwen2VLProcessor
from transformers.models.glm_image.image_processing_pil_glm_image import GlmImageImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

# diffusers finds the base class that says how to load a component by its name, in the module of the component.
__all__ = ["ImageTextProcessor", "ProcessorMixin", "ShortGlmProcessor", "glm_processor", "processor"]


class ImageTextProcessor(Qwen2VLProcessor):  # type: ignore[misc]
    """Text and pictures, no videos: the base class reads off this signature which parts it has, loads and saves."""

    def __init__(
        self,
        image_processor: Qwen2VLImageProcessorPil | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def processor(tokenizer: PreTrainedTokenizerBase) -> ImageTextProcessor:
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    return ImageTextProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)


class ShortGlmProcessor(GlmImageProcessor):  # type: ignore[misc]
    """Asks for a preview of two by two tokens before the picture's own. The base class asks for 256, most of a run."""

    def _get_target_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        token_h, token_w, *_ = super()._get_target_shape(height, width)
        return token_h, token_w, 2, 2


def glm_processor(tokenizer: PreTrainedTokenizerBase) -> ShortGlmProcessor:
    pictures = GlmImageImageProcessorPil(
        size={"shortest_edge": 64 * 64, "longest_edge": 128 * 128}, patch_size=16, merge_size=1, temporal_patch_size=1
    )
    return ShortGlmProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)
