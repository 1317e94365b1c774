"""Small configurations of transformers' architectures: sizes by name, and whole ones where numbers depend on one another."""

from __future__ import annotations

from typing import Any

# Whatever a configuration calls its sizes. Every name stands for one number in all architectures.
SMALL = (
    dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 64)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size"), 96)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 4)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4)
    | dict.fromkeys(("num_key_value_heads", "num_shared_experts", "n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1)
    | dict.fromkeys(("num_experts_per_tok", "moe_topk", "linear_num_key_heads"), 2)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "linear_num_value_heads"), 4)
    | dict.fromkeys(("head_dim", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "v_head_dim", "hidden_size_per_layer_input"), 16)
    | dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16)
    | dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "state_size", "mamba_d_state", "time_step_rank"), 8)
    | {"vocab_size": 96, "vocab_size_per_layer_input": 96, "expand": 2, "mamba_n_heads": 4, "mamba_d_head": 32, "sliding_window": 32, "lru_width": 64}
    | dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128)
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
)
# Those of encoders and decoders, of sight and hearing: only where configurations lie inside one another.
SMALLER = (
    SMALL
    | dict.fromkeys(("embed_dim", "hidden_dim", "out_hidden_size", "projection_dim", "encoder_hidden_size", "output_dim", "decoder_dim"), 64)
    | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "encoder_intermediate_size", "mlp_dim", "decoder_hidden_size"), 96)
    | dict.fromkeys(("depth", "encoder_num_hidden_layers", "decoder_num_hidden_layers", "num_encoder_layers", "num_decoder_layers"), 2)
    | dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads", "num_cross_attention_heads"), 4)
    | dict.fromkeys(("encoder_num_key_value_heads", "decoder_num_key_value_heads"), 4)
)
# Rotary positions of time, height and width: their shares of half a head of 16. Of the others the configuration itself says so.
AXES = dict.fromkeys(("glm4v", "glm46v", "glm_ocr", "glmga", "qwen2_vl", "qwen2_5_vl"), (2, 3, 3)) | {"glm4v_moe": (1, 1, 2)}
_DENSE = {name: SMALL[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")}
_DENSE |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SPARSE = _DENSE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
_STATES_AND_EXPERTS = _DENSE | {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "n_groups": 1, "ssm_state_size": 8}
_STATES_AND_EXPERTS |= {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_routed_experts": 4, "moe_intermediate_size": 48}
_STATES_AND_EXPERTS |= {"moe_shared_expert_intermediate_size": 48}
_INKLING = _DENSE | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 32}
_INKLING |= {"d_rel": 8, "rel_extent": 32, "moe_intermediate_size": 48, "n_routed_experts": 4, "num_experts_per_tok": 2}
_INKLING |= {"layer_types": ["hybrid_sliding", "hybrid"] * 2}
_BART = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_attention_heads": 4}
_BART |= {"decoder_attention_heads": 4, "max_position_embeddings": 128}
_SEAMLESS = {name: value for name, value in _BART.items() if name != "d_model"} | {"hidden_size": 64, "vocab_size": 96}
_SEAMLESS |= {"speech_encoder_layers": 2, "speech_encoder_attention_heads": 4, "speech_encoder_intermediate_size": 96}
_SEAMLESS |= {"feature_projection_input_dim": 32, "max_source_positions": 32}
# Sight and hearing.
_SIGHT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
_SIGHT_OF_GEMMA = _SIGHT | {"num_key_value_heads": 4, "head_dim": 16, "position_embedding_size": 32}
_SIGHT_OF_MUSE = _SIGHT | {"max_position_embeddings": 16, "pos_emb_height": 4, "pos_emb_width": 4}
_SIGHT_OF_QWEN = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 64, "num_position_embeddings": 16}
_PIXELS = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
_CODEC = {"hidden_size": 16, "num_filters": 8, "downsampling_ratios": [2, 2], "depths": [1, 1, 1]}
_WHISPER = {"num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "d_model": 64, "output_dim": 64}
_THREE_AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
# The tokens that stand for images, videos and sounds.
_TOKENS = {"image_token_id": 5, "video_token_id": 6, "audio_token_id": 7}
_TOKENS_OF_GEMMA = _TOKENS | {"boi_token_id": 8, "eoi_token_id": 9, "boa_token_id": 10, "eoa_token_index": 11}
_TOKENS_OF_GLM = {"image_start_token_id": 8, "image_end_token_id": 9, "video_start_token_id": 10, "video_end_token_id": 11}
_TOKENS_OF_GLM |= {"image_token_id": 5, "video_token_id": 6}
_TOKENS_OF_QWEN = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 8, "vision_end_token_id": 9}
_TOKENS_OF_SOUND = {"audio_token_id": 7, "audio_bos_token_id": 8, "audio_eos_token_id": 9}
# Where numbers depend on one another.
BY_HAND: dict[str, dict[str, Any]] = {
    "blip": {"text_config": _DENSE | {"encoder_hidden_size": 64, "sep_token_id": 3}, "vision_config": _SIGHT}
    | {"projection_dim": 64, "image_text_hidden_size": 64},
    "blt": _DENSE
    | {"vocab_size": 260, "encoder_hash_byte_group_vocab": 96, "encoder_hash_byte_group_size": [3, 4]}
    | {"patcher_config": _DENSE | {"vocab_size": 260}, "global_config": _DENSE | {"hidden_size": 128, "head_dim": 32}}
    | {part: _DENSE | {"vocab_size": 260, "hidden_size_global": 128} for part in ("encoder_config", "decoder_config")},
    "chameleon": _DENSE
    | {"vq_config": _PIXELS | {"embed_dim": 16, "num_embeddings": 32, "latent_channels": 32, "resolution": 32}}
    | {"vocabulary_map": {"<image>": 5, "IMGIMGAZ": 10, "IMGIMGBZ": 11}, "image_token_id": 5},
    "cohere2_vision": {"text_config": _DENSE, "vision_config": _SIGHT, "alignment_intermediate_size": 96, "image_token_id": 5},
    "cohere_compass": _TOKENS_OF_QWEN
    | {"text_config": _DENSE | {"rope_parameters": {"full_attention": _THREE_AXES}}}
    | {"vision_config": _SIGHT_OF_QWEN | {"deepstack_visual_indexes": [0, 1]}},
    "cohere_compass_text": _DENSE | {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cosmos3_edge": {"text_config": _DENSE | {"rope_parameters": _THREE_AXES}, "vision_config": _SIGHT | {"num_patches": 16}}
    | {"projector_hidden_size": 96},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "vocab_size": 96,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
    }
    | {"ffn_config": {"hidden_size": 64, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}, "bos_token_id": 1, "eos_token_id": 2},
    "deepseek_ocr2": {"text_config": _SPARSE | {"n_routed_experts": 4, "n_shared_experts": 1, "mlp_layer_types": ["dense"] + ["sparse"] * 3}}
    | {"vision_config": {"encoder_config": _DENSE, "sam_config": _SIGHT | {"output_channels": 32, "downsample_channels": [48, 64]}}}
    | {"image_token_id": 5},
    "dia": {"encoder_config": _DENSE, "delay_pattern": [0, 1, 2], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    | {
        "decoder_config": _DENSE
        | {"cross_num_attention_heads": 4, "cross_num_key_value_heads": 4, "cross_head_dim": 16}
        | {"cross_hidden_size": 64, "num_channels": 3}
    },
    "diffllama": _DENSE,
    "diffusion_gemma": {"text_config": _SPARSE | {"top_k_experts": 2, "global_head_dim": 16}, "vision_config": _SIGHT_OF_GEMMA}
    | {"image_token_id": 5, "boi_token_id": 8, "eoi_token_id": 9},
    "dots1": _DENSE
    | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_group": 1}
    | {"topk_group": 1, "first_k_dense_replace": 1},
    "dots3_note": {
        "text_config": _SPARSE
        | _LATENT
        | {"num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "n_shared_experts": 1}
        | {"n_routed_experts": 4, "index_topk": 16, "index_head_dim": 16, "index_n_heads": 2, "shared_experts_intermediate_size": 48}
        | {"layer_types": ["indexed_attention", "sliding_attention"] * 2, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2}
        | {"swa_q_lora_rank": 16, "swa_kv_lora_rank": 32, "swa_head_dim": 32, "swa_qk_nope_head_dim": 24, "swa_v_head_dim": 16}
    }
    | {
        "vision_config": _SIGHT
        | {"moe_intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"mlp_layer_types": ["dense", "sparse"], "adapter_in_dim": 64, "adapter_out_dim": 64}
    }
    | {"audio_config": _SIGHT | {"feature_size": 16, "downsample_hidden_size": 16, "adapter_input_size": 64, "adapter_out_dim": 64}}
    | _TOKENS,
    "emu3": {"text_config": _DENSE, "vq_config": _PIXELS | {"codebook_size": 32, "hidden_size": 32, "attn_resolutions": [1]}}
    | {"vocabulary_map": {"<image>": 5, "<|visual token 000000|>": 10, "<|visual token 000001|>": 11}, "image_token_id": 5},
    "ernie4_5_vl_moe": {
        "text_config": _DENSE
        | {"moe_intermediate_size": [48, 24], "moe_k": 2, "moe_num_experts": 4, "moe_num_shared_experts": 1}
        | {"mlp_layer_types": ["dense"] + ["sparse"] * 3, "rope_parameters": _THREE_AXES | {"mrope_section": [3, 3, 2]}}
    }
    | {"vision_config": _SIGHT_OF_QWEN}
    | _TOKENS_OF_GLM,
    "falcon_h1": _DENSE | {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
    "florence2": {"text_config": _BART | {"vocab_size": 96}, "image_token_id": 5}
    | {
        "vision_config": {"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True]}
        | {"embed_dim": [32, 64], "num_heads": [2, 4], "num_groups": [2, 4], "window_size": 4, "projection_dim": 64}
    },
    "fsmt": _BART | {"langs": ["en", "de"], "src_vocab_size": 96, "tgt_vocab_size": 96},
    "fun_asr_nano": {"text_config": _DENSE, "adaptor_config": _SIGHT | {"intermediate_size": 16, "projector_hidden_size": 96}, "audio_token_id": 7}
    | {"audio_config": _SIGHT | {"num_mel_bins": 16, "num_stacked_frames": 3, "num_timestamp_prediction_layers": 2}},
    "gemma3n_text": _DENSE
    | {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "laurel_rank": 8}
    | {"intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4": _TOKENS_OF_GEMMA
    | {"text_config": _DENSE | {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "global_head_dim": 32}}
    | {"vision_config": _SIGHT_OF_GEMMA, "audio_config": _SIGHT | {"subsampling_conv_channels": [16, 8], "output_proj_dims": 64}},
    "gemma4_text": _DENSE | {"vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0, "global_head_dim": 16},
    "gemma4_unified": _TOKENS_OF_GEMMA
    | {"text_config": _DENSE | {"global_head_dim": 32}, "audio_config": {"audio_embed_dim": 64}}
    | {"vision_config": {"patch_size": 4, "mm_embed_dim": 64, "mm_posemb_size": 32, "output_proj_dims": 64}},
    # In real ones every layer uses keys and values of another model. transformers 5.23 builds none of those.
    "gemma4_unified_assistant": {
        "text_config": _DENSE | {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 32},
        "backbone_hidden_size": 64,
    },
    "glm5_next": {
        "text_config": _SPARSE
        | _LATENT
        | {"n_routed_experts": 4, "num_key_value_heads": 4, "mlp_layer_types": ["dense"] + ["sparse"] * 3}
        | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 16, "index_kpool": 4, "linear_head_dim": 16, "linear_num_heads": 4}
    }
    | {"vision_config": _SIGHT_OF_QWEN | {"projection_intermediate_size": 96}}
    | _TOKENS_OF_GLM,
    "gpt_neo": {"vocab_size": 96, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]}
    | {"max_position_embeddings": 128, "window_size": 32, "bos_token_id": 1, "eos_token_id": 2},
    "granite4_vision": {"text_config": _DENSE, "vision_config": _SIGHT, "qformer_config": _DENSE | {"num_hidden_layers": 1}, "image_token_index": 5}
    | {"downsample_rate": "1/2", "deepstack_layer_map": [[-2, 0], [-1, 1]], "spatial_target_layers": [2, 3]},
    "hunyuan_v1_dense": _DENSE,
    "hunyuan_v1_moe": _DENSE | {"num_experts": 4, "moe_topk": 2},
    "hunyuan_vl": {"text_config": _DENSE, "image_token_id": 5, "im_start_id": 8, "im_end_id": 9, "im_newline_id": 10}
    | {"vision_config": _SIGHT | {"num_key_value_heads": 4, "out_hidden_size": 64, "text_hidden_size": 64, "max_image_size": 64}},
    "inkling2": {"text_config": _INKLING | {"unpadded_vocab_size": 90, "n_layers_per_attn_res_block": 2}, "image_token_id": 5}
    | {"vision_config": _SIGHT | {"posemb_grid_size": 4, "projection_hidden_dim": 96, "text_hidden_size": 64}},
    "inkling_mm_model": {"text_config": _INKLING | {"mlp_layer_types": ["dense"] + ["sparse"] * 3, "n_shared_experts": 1}}
    | {"vision_config": {"hidden_size": 64, "n_layers": 2, "num_attention_heads": 4, "patch_size": 8, "text_hidden_size": 64}}
    | {"audio_config": {"n_mel_bins": 8, "mel_vocab_size": 16, "text_hidden_size": 64}}
    | _TOKENS
    | {"image_bos_token_id": 8, "audio_bos_token_id": 9},
    "janus": {"text_config": _DENSE, "vision_config": _SIGHT | {"mlp_ratio": 1.5, "projection_dim": 64, "num_image_tokens": 16}, "image_token_id": 5}
    | {"vq_config": _PIXELS | {"num_embeddings": 32, "latent_channels": 32, "num_patches": 4, "projection_dim": 64, "image_token_embed_dim": 64}},
    "kyutai_speech_to_text": _DENSE
    | {"ffn_dim": 96, "codebook_vocab_size": 16, "num_codebooks": 4, "audio_bos_token_id": 15, "audio_pad_token_id": 160}
    | {
        "codec_config": _DENSE
        | {"num_filters": 4, "upsampling_ratios": [4, 2], "codebook_size": 16, "codebook_dim": 16, "num_quantizers": 4}
        | {"vector_quantization_hidden_dimension": 16, "upsample_groups": 64}
    },
    "laguna": _SPARSE | {"num_attention_heads_per_layer": [4] * 4},
    "lfm2_moe": _SPARSE | {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    "llama4": {"text_config": _DENSE | {"intermediate_size_mlp": 96, "num_local_experts": 4, "interleave_moe_layer_step": 2}}
    | {"vision_config": _SIGHT | {"intermediate_size": 256, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64}}
    | {"boi_token_index": 8, "eoi_token_index": 9, "image_token_index": 5},
    "mamba2": {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "num_heads": 4, "head_dim": 32, "state_size": 8, "n_groups": 1}
    | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "ministral": _DENSE,
    "mllama": {"text_config": _DENSE | {"cross_attention_layers": [1, 3]}, "image_token_index": 5}
    | {"vision_config": _SIGHT | {"attention_heads": 4, "num_global_layers": 1, "vision_output_dim": 192, "intermediate_layers_indices": [0, 1]}},
    "molmo2": {"text_config": _DENSE | {"additional_vocab_size": 16}, "image_patch_id": 97, "image_start_token_id": 98, "image_end_token_id": 99}
    | {"low_res_image_start_token_id": 100, "frame_start_token_id": 101, "frame_end_token_id": 102}
    | {"vision_config": _SIGHT | {"image_size": [32, 32], "head_dim": 16, "num_key_value_heads": 4}}
    | {"adapter_config": _SIGHT | {"head_dim": 16, "num_key_value_heads": 4, "text_hidden_size": 64, "vision_feature_layer": [1, 0]}},
    "moonshine_streaming": _DENSE
    | {"num_key_value_heads": 4}
    | {"encoder_config": _DENSE | {"num_key_value_heads": 4, "num_hidden_layers": 2, "sliding_windows": [[16, 4], [16, 0]]}},
    "muse_glimmer": {"text_config": _DENSE, "vision_config": _SIGHT_OF_MUSE, "image_token_id": 5, "video_token_id": 6}
    | {"out_hidden_size": 96, "projector_hidden_size": 96},
    "muse_spark": _TOKENS
    | {"text_config": _SPARSE | {"num_local_experts": 4, "moe_hidden_size": 32, "mlp_layer_types": ["dense"] + ["sparse"] * 3}}
    | {"audio_config": {"patch_sizes": [4, 2], "hidden_sizes": [32, 64], "depths": [1, 1], "num_hidden_layers": 2, "out_hidden_size": 64}}
    | {"vision_config": _SIGHT_OF_MUSE, "out_hidden_size": 96, "projector_hidden_size": 96},
    "nemo_speechlm": {"text_config": _STATES_AND_EXPERTS, "word_timestamp_config": _SIGHT | {"vocab_size": 96, "blank_token_id": 95}}
    | {
        "audio_config": {
            "asr_config": _SIGHT | {"num_mel_bins": 16},
            "diarization_config": {"audio_config": _SIGHT | {"num_mel_bins": 16}, "head_config": {"hidden_size": 32, "audio_hidden_size": 64}},
        },
        "audio_token_id": 7,
    },
    "nemotron": _DENSE,
    "nemotron_h_omni": {"text_config": _STATES_AND_EXPERTS, "projector_hidden_size": 96, "vision_hidden_size": 64}
    | {"vision_config": _SIGHT | {"max_img_size": 64, "mlp_ratio": 1.5, "patch_dim": 192, "video_patch_dim": 384, "video_temporal_patch_size": 2}}
    | _TOKENS,
    "phi4_multimodal": _DENSE
    | {"vision_config": _SIGHT | {"crop_size": 32, "image_token_id": 5}}
    | {
        "audio_config": _SIGHT
        | {"num_blocks": 2, "ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64, "input_size": 16}
        | {"nemo_conv_channels": 16, "nemo_final_size": 2, "bias_max_distance": 32, "audio_token_id": 7}
    },
    "qwen3_omni_moe": {
        "thinker_config": {"text_config": _SPARSE | {"rope_parameters": _THREE_AXES}}
        | {"audio_config": _WHISPER | {"downsample_hidden_size": 16}, "vision_config": _SIGHT_OF_QWEN | {"deepstack_visual_indexes": [0, 1]}}
    }
    | {
        "talker_config": {"text_config": _SPARSE | {"shared_expert_intermediate_size": 48, "rope_parameters": _THREE_AXES}}
        | {"thinker_hidden_size": 64, "num_code_groups": 4, "accept_hidden_layer": 2, "spatial_merge_size": 2}
        | {"code_predictor_config": _DENSE | {"num_code_groups": 4}}
    }
    | {
        "code2wav_config": _SIGHT
        | {"codebook_size": 32, "num_key_value_heads": 4, "num_quantizers": 4, "decoder_dim": 32}
        | {"upsample_rates": [4, 2], "upsampling_ratios": [2]}
    },
    "qwen4_exp": {
        "text_config": _SPARSE
        | {"shared_expert_intermediate_size": 48, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
        | {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "hc_count": 2, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1}
        | {"indexer_head_dim": 16, "indexer_budget": 16, "indexer_compress_ratio": 4, "ple_layer_ids": [1], "ple_embed_dim": 32}
        | {"heads_per_ngram": 2, "ngram_vocab_size_base": 100, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2}
    }
    | {"vision_config": _SIGHT_OF_QWEN}
    | _TOKENS_OF_QWEN,
    "reformer": {"vocab_size": 96, "hidden_size": 64, "feed_forward_size": 96, "num_attention_heads": 4, "attention_head_size": 16}
    | {"attn_layers": ["local", "lsh"] * 2, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [24, 40], "max_position_embeddings": 128}
    | {"is_decoder": True, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "roc_bert": _DENSE
    | {"pronunciation_embed_dim": 32, "pronunciation_vocab_size": 48, "shape_embed_dim": 32, "shape_vocab_size": 48, "is_decoder": True},
    "seamless_m4t": _SEAMLESS,
    "seamless_m4t_v2": _SEAMLESS,
    "vibevoice": _TOKENS_OF_SOUND
    | {"text_config": _DENSE, "vocab_size": 96, "pad_token_id": 0, "eos_token_id": 2, "audio_config": _CODEC, "semantic_model_config": _CODEC}
    | {"diffusion_head_config": {"hidden_size": 64, "latent_size": 16, "num_hidden_layers": 2, "intermediate_size": 96}},
    "vibevoice_asr": _TOKENS_OF_SOUND
    | {"text_config": _DENSE, "acoustic_tokenizer_encoder_config": _CODEC, "semantic_tokenizer_encoder_config": _CODEC},
    "zaya": _DENSE | {"num_experts": 4, "moe_intermediate_size": 48, "router_hidden_size": 32},
}
BY_HAND |= {f"{name}_text": BY_HAND[name]["text_config"] for name in ("dots3_note", "qwen4_exp")}
