"""Tiny pipelines of the families' own classes, with random weights and tokenizers built on the spot."""

from collections.abc import Callable
from string import ascii_lowercase

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from twinrl.machine.compat import ensure_torchvision

ensure_torchvision()

import diffusers  # noqa: E402
import transformers  # noqa: E402

LETTERS = [
    *ascii_lowercase,
    " ",
    ":",
    "<",
    ">",
    "|",
    "_",
    "\n",
    *"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "'",
    "-",
    ",",
    ".",
    "(",
    ")",
]
BYTES = {" ": "Ġ", "\n": "Ċ"}  # how byte-level tokenizers write them


def clip_tokenizer():
    words = [f"{letter}</w>" for letter in ascii_lowercase]
    vocab = {token: i for i, token in enumerate([*ascii_lowercase, *words, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -2.0) for c in ["▁", *ascii_lowercase])]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0)


def qwen_tokenizer():
    tokens = [*(BYTES.get(c, c) for c in LETTERS), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = transformers.Qwen2Tokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    return tokenizer


def gemma_tokenizer():
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    tokenizer = transformers.GemmaTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[])
    start = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])  # so that no prompt is empty
    tokenizer.backend_tokenizer.post_processor = start
    return tokenizer


def clip_encoder(kind, projection=16):
    config = transformers.CLIPTextConfig(
        vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=projection, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    return kind(config)


def t5_encoder():
    config = transformers.T5Config(
        vocab_size=40, d_model=32, d_kv=8, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


def kl_vae(shift=0.06):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        sample_size=16, scaling_factor=1.5, shift_factor=shift, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def euler(**settings):
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=euler(shift=3.0), vae=kl_vae(),
        text_encoder=clip_encoder(transformers.CLIPTextModelWithProjection), tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(transformers.CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def flux():
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=transformer, scheduler=euler(use_dynamic_shifting=True), vae=kl_vae(),
        text_encoder=clip_encoder(transformers.CLIPTextModel), tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def qwen_image():
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 70, "rope_parameters": {"type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.7, 1.0],
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        transformer=transformer, scheduler=euler(use_dynamic_shifting=True), vae=vae, tokenizer=qwen_tokenizer(),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
    )  # fmt: skip


def sana():
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, scaling_factor=0.4,
        encoder_block_types=("ResBlock", "ResBlock"), decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        downsample_block_type="conv", upsample_block_type="interpolate",
        decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip
    config = transformers.Gemma2Config(
        vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    return diffusers.SanaPipeline(
        transformer=transformer, scheduler=euler(shift=3.0), vae=vae, tokenizer=gemma_tokenizer(),
        text_encoder=transformers.Gemma2Model(config),
    )  # fmt: skip


def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[640, 32, 32],
    )  # fmt: skip
    config = transformers.Qwen3Config(
        vocab_size=80, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return diffusers.ZImagePipeline(
        transformer=transformer, scheduler=euler(shift=3.0), vae=kl_vae(), tokenizer=qwen_tokenizer(),
        text_encoder=transformers.Qwen3Model(config),
    )  # fmt: skip


def flux2_vae():
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, layers_per_block=1,
        sample_size=16,
    )  # fmt: skip
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def flux2_transformer(**settings):
    return diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(4, 4, 4, 4), **settings,
    )  # fmt: skip


def flux2_klein():
    config = transformers.Qwen3Config(
        vocab_size=80, hidden_size=8, intermediate_size=8, num_hidden_layers=27, num_attention_heads=2,
        num_key_value_heads=2, head_dim=4,
    )  # fmt: skip  # its pipeline takes the 9th, 18th and 27th layer
    return diffusers.Flux2KleinPipeline(
        transformer=flux2_transformer(guidance_embeds=False), scheduler=euler(use_dynamic_shifting=True),
        vae=flux2_vae(), tokenizer=qwen_tokenizer(), text_encoder=transformers.Qwen3ForCausalLM(config),
    )  # fmt: skip


def pixtral_processor():
    """Of a tokenizer of letters, padded on the left; pictures are never shown to it."""
    tokens = ["<pad>", "<s>", "</s>", "<unk>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", *(BYTES.get(c, c) for c in LETTERS)]
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    letters = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters, padding_side="left", **named)
    return transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(), tokenizer=tokenizer,
        chat_template="<s>{% for m in messages if m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endfor %}",
    )  # fmt: skip  # without the system's part, which is a paragraph


def flux2():
    text = transformers.MistralConfig(
        vocab_size=90, hidden_size=8, intermediate_size=8, num_hidden_layers=30, num_attention_heads=2,
        num_key_value_heads=2, head_dim=4,
    )  # fmt: skip  # its pipeline takes the 10th, 20th and 30th layer
    vision = transformers.PixtralVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    encoder = transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=4)
    )
    return diffusers.Flux2Pipeline(
        transformer=flux2_transformer(guidance_embeds=True), scheduler=euler(use_dynamic_shifting=True),
        vae=flux2_vae(), tokenizer=pixtral_processor(), text_encoder=encoder,
    )  # fmt: skip


def stable_diffusion(prediction="epsilon"):
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        unet=unet, scheduler=ddim(prediction), vae=kl_vae(None), tokenizer=clip_tokenizer(),
        text_encoder=clip_encoder(transformers.CLIPTextModel), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def ddim(prediction="epsilon"):
    """Stable Diffusion's schedule, all of it in as many steps."""
    return diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction],
    )  # fmt: skip


BUILDERS: dict[str, Callable] = {
    "sd3": sd3,
    "qwen_image": qwen_image,
    "flux": flux,
    "flux2_klein": flux2_klein,
    "flux2": flux2,
    "sana": sana,
    "z_image": z_image,
    "stable_diffusion": stable_diffusion,
}


def build(name):
    """The tiny pipeline of a family; the same weights every time, every parameter non-trivial."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        pipeline = BUILDERS[name]()
        for module in pipeline.components.values():
            if isinstance(module, torch.nn.Module):
                shake(module.eval())
    return pipeline


@torch.no_grad()
def shake(module):
    """Small noise on every parameter: gates and embeddings that start at zero are open."""
    for parameter in module.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape))
