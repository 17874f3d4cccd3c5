"""Keys of config.json: what is read, and what changes nothing in what the model computes."""

# Keys that describe training, storage or the framework, not the function that the model computes.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _name_or_path
    add_cross_attention attention_dropout attn_implementation auto_map bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id dtype embd_pdrop finetuning_task id2label
    initializer_range is_decoder is_encoder_decoder is_llama_config keys_to_ignore_at_inference label2id
    max_sequence_length mlp_only_layers model_name neftune_noise_alpha num_logits_to_keep output_attentions
    output_hidden_states pad_token_id prefix pretraining_tp problem_type pruned_heads resid_pdrop return_dict
    rope_interleaved sep_token_id task_specific_params tie_encoder_decoder tokenizer_class torch_dtype
    torchscript transformers.js_config transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache
    vocab_file
    """.split()
)

# What older versions of transformers wrote here instead of into generation_config.json, where it is read.
GENERATION = frozenset(
    """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
    """.split()
)

# What forks of transformers know, and the value that changes nothing.
NEUTRAL = {"full_attn_mod": 1, "interpolate_factor": 1}

# What config.py reads, beside what only some architectures have.
USED = frozenset(
    """
    architectures eos_token_id head_dim hidden_act hidden_size intermediate_size max_position_embeddings
    model_type num_attention_heads num_hidden_layers num_key_value_heads original_max_position_embeddings
    partial_rotary_factor quantization_config rms_norm_eps rope_parameters rope_scaling rope_theta
    tie_word_embeddings vocab_size
    """.split()
)
