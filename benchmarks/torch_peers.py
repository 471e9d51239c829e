"""The same shapes in PyTorch, assembled from transformers' own models: what `peers.py` compares with.

The weights are random; both sides make the same number of frames of the same sizes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
import transformers
from transformers import DynamicCache
from transformers.models.csm import CsmConfig, CsmDepthDecoderConfig, CsmForConditionalGeneration
from transformers.models.csm.modeling_csm import CsmDepthDecoderForCausalLM

from chroma_jax import schedule
from chroma_jax.config import ChromaConfig, hf


def _llama_values(section: dict, vocab_size: int) -> dict:
    """A LLaMA's section of config.json without what only Chroma knows."""
    dropped = ("model_type", "audio_num_codebooks", "audio_embedding_dim", "shared_first_position")
    return {k: v for k, v in section.items() if k not in dropped} | {"vocab_size": vocab_size}


def _depth_values(config: ChromaConfig) -> dict:
    section = hf.write(config)["decoder_config"]
    values = _llama_values(section, config.decoder.vocab_size)
    return values | dict(
        num_codebooks=config.num_codebooks, backbone_hidden_size=config.decoder.embedding_size
    )


def _codec_values(config: ChromaConfig) -> dict:
    return {k: v for k, v in hf.write(config)["codec_config"].items() if k != "model_type"}


class Assembled:
    """Thinker, LLaMA, depth decoder and Mimi, looped as the reference loops: one frame at a time, all sound at the end.

    A frame is a Backbone step on one position, or on three where a text token comes in, then the depth decoder: seven tokens
    by its own `generate`, as in the reference, or by plain forward calls. Every second frame takes one step of the Thinker.
    """

    def __init__(self, config: ChromaConfig, *, by_generate: bool, dtype: torch.dtype, device: str):
        from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as omni

        self.config, self.by_generate, self.device = config, by_generate, device
        values = copy.deepcopy(hf.write(config)["thinker_config"])
        values.pop("model_type")
        eyes = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2,
                    out_hidden_size=config.reasoner.text.hidden_size)  # fmt: skip
        others = dict(image_token_index=1, video_token_index=2, vision_start_token_id=3, vision_end_token_id=4)  # fmt: skip
        torch.manual_seed(0)
        self.thinker = omni.Qwen2_5OmniThinkerForConditionalGeneration(
            omni.Qwen2_5OmniThinkerConfig(**values, vision_config=eyes, **others)
        )
        backbone = _llama_values(hf.write(config)["backbone_config"], 8)
        self.backbone = transformers.LlamaModel(transformers.LlamaConfig(**backbone))
        self.depth = CsmDepthDecoderForCausalLM(CsmDepthDecoderConfig(**_depth_values(config)))
        self.mimi = transformers.MimiModel(transformers.MimiConfig(**_codec_values(config)))
        width, audio = config.backbone.llama.hidden_size, config.backbone.vocab_size
        self.head = torch.nn.Linear(width, audio, bias=False)
        self.table = torch.nn.Embedding(config.num_codebooks * audio, width)
        for module in (self.thinker, self.backbone, self.depth, self.head, self.table):
            module.to(device=device, dtype=dtype).eval()
        self.mimi.to(device).eval()

    def start(self, question: int, voice: int) -> None:
        """The prefill of a question and a voice of so many positions."""
        self.thoughts, self.past = DynamicCache(), DynamicCache()
        ids = torch.randint(5, 200, (1, question), device=self.device)
        self._think(ids)
        x = self.thinker.get_input_embeddings()(ids[:, :1]).expand(1, voice, -1)
        self.backbone(inputs_embeds=x, past_key_values=self.past, use_cache=True)
        self.frame = torch.zeros(1, self.config.num_codebooks, dtype=torch.long, device=self.device)

    def run(self, count: int) -> torch.Tensor:
        """`count` more frames, and their sound."""
        books, frames = self.config.num_codebooks, []
        offsets = torch.arange(books, device=self.device) * self.config.backbone.vocab_size
        for i in range(count):
            x = self.table(self.frame + offsets).sum(1, keepdim=True)
            if i % schedule.FRAMES_PER_TEXT == 0:
                e = self.thinker.get_input_embeddings()(self.token)
                x = torch.cat([x, self.hidden, e], dim=1)
            y = self.backbone(inputs_embeds=x, past_key_values=self.past, use_cache=True)
            hidden = y.last_hidden_state[:, -1]
            code = self.head(hidden).float().argmax(-1, keepdim=True)
            self.frame = self._fill(hidden, code)
            frames.append(self.frame)
            if i % schedule.FRAMES_PER_TEXT == 1:
                self._think(self.token)
        codes = torch.stack(frames, dim=2).clamp(max=self.config.codec.codebook_size - 1)
        return self.mimi.decode(codes).audio_values

    def _think(self, ids: torch.Tensor) -> None:
        out = self.thinker(
            input_ids=ids, past_key_values=self.thoughts, use_cache=True, output_hidden_states=True
        )
        self.hidden = out.hidden_states[-1][:, -1:]
        self.token = out.logits[:, -1:].float().argmax(-1)

    def _fill(self, hidden: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        ids = torch.nn.functional.pad(code, (1, 0))
        if self.by_generate:
            new = self.config.num_codebooks - 1
            sizes = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False)
            return self.depth.generate(input_ids=ids, backbone_last_hidden_state=hidden.clone(), **sizes)[:, 1:]  # fmt: skip
        past, frame = DynamicCache(), [code]
        out = self.depth(
            input_ids=ids, backbone_last_hidden_state=hidden, past_key_values=past,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        while True:
            frame.append(out.logits[:, -1:].float().argmax(-1)[:, 0:1])
            if len(frame) == self.config.num_codebooks:
                return torch.cat(frame, dim=1)
            out = self.depth(
                input_ids=frame[-1], past_key_values=past, use_cache=True, logits_to_keep=1
            )


class Csm:
    """transformers' CSM of the Backbone's, Decoder's and Codec's shapes, by its own `generate`. It has no Reasoner to run."""

    def __init__(self, config: ChromaConfig, *, compiled: bool, dtype: torch.dtype, device: str):
        torch.manual_seed(0)
        backbone = _llama_values(hf.write(config)["backbone_config"], config.backbone.vocab_size)
        self.device = device
        self.model = CsmForConditionalGeneration(
            CsmConfig(
                **backbone,
                num_codebooks=config.num_codebooks,
                text_vocab_size=512,
                depth_decoder_config=_depth_values(config),
                codec_config=_codec_values(config) | {"model_type": "mimi"},
                codebook_pad_token_id=config.codebook_pad_token_id,
                codebook_eos_token_id=config.codebook_eos_token_id,
                pad_token_id=1, bos_token_id=2, audio_token_id=3, audio_eos_token_id=4,
            )
        ).to(device=device, dtype=dtype).eval()  # fmt: skip
        self.model.codec_model.to(torch.float32)
        # Only ids that the codec has, and never the stop frame: logits of the others become means of two, never the largest.
        unused = [config.codebook_eos_token_id]
        unused += range(config.codec.codebook_size, config.backbone.vocab_size)
        with torch.no_grad():
            head, heads = self.model.lm_head.weight, self.model.depth_decoder.codebooks_head.weight
            head[unused] = (head[1] + head[2]) / 2
            heads[:, :, unused] = ((heads[:, :, 1] + heads[:, :, 2]) / 2)[..., None]
        self.options = {}
        if compiled:
            self.options = dict(
                cache_implementation="static", depth_decoder_cache_implementation="static"
            )
            # Elsewhere `generate` compiles by itself; on a CPU it must be told.
            if device == "cpu":
                for part in (self.model, self.model.depth_decoder):
                    part.forward = torch.compile(part.forward)

    def start(self, question: int, voice: int) -> None:
        """A prompt as long as the voice."""
        del question
        self.ids = torch.randint(5, 200, (1, voice), device=self.device)

    def run(self, count: int) -> torch.Tensor:
        """The prompt, `count` frames, and their sound."""
        return self.model.generate(
            input_ids=self.ids, attention_mask=torch.ones_like(self.ids), do_sample=False,
            max_new_tokens=count, output_audio=True, **self.options,
        )[0]  # fmt: skip


def seconds_per_frame(peer: Assembled | Csm, question: int, voice: int, count: int) -> float:
    """Seconds that each further frame costs, its share of the sound included and the prefill not."""
    with torch.inference_mode():
        peer.start(question, voice)
        whole = _timed(lambda: peer.run(count), peer.device)
        if isinstance(peer, Assembled):
            return whole / count
        short = _timed(lambda: peer.run(2), peer.device)
        return (whole - short) / (count - 2)


def _timed(function: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start
