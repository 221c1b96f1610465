"""Everything inside vLLM that this package overrides, calls, reads or replaces.

vLLM promises none of it. ``contract`` checks it at start-up, and the tests check it for every supported version.
Extend the list with the code: what is not listed here breaks with a wrong answer instead of a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Need(Enum):
    """What is expected of one path."""

    OVERRIDDEN = "overridden"  # a function with exactly these parameters
    CALLED = "called"  # a function that accepts these: leading ones by position, those after "*" by name
    ATTRIBUTES = "attributes"  # a class, module or function with these; "name=value" pins a literal
    STORES = "stores"  # a function that assigns these attributes
    REFERS = "refers"  # a function or class that reads or calls these: an override that nobody calls does nothing


class Where(Enum):
    """Which process needs it."""

    FRONT = "front"  # the one that reads the user's arguments
    CPU = "cpu"  # a worker
    CUDA = "cuda"  # a worker
    BOTH = "both"  # a worker on either platform


@dataclass(frozen=True)
class Entry:
    """One thing that vLLM must have.

    Attributes:
        path: ``module:qualified.name``, or a module alone.
        need: how ``names`` are meant.
        names: parameters or attributes.
        purpose: what it is needed for; completes "needed to ...".
        where: the process that needs it.
    """

    path: str
    need: Need
    names: tuple[str, ...]
    purpose: str
    where: Where


def _needed_to(purpose: str, where: Where, *rows: tuple[str, Need, str]) -> list[Entry]:
    return [Entry(path, need, tuple(names.split()), purpose, where) for path, need, names in rows]


FRONT, CPU, CUDA, BOTH = Where
OVERRIDDEN, CALLED, ATTRIBUTES, STORES, REFERS = Need

_ARGS = "vllm.engine.arg_utils:EngineArgs"
_PROM = "vllm.v1.spec_decode.metrics:SpecDecodingProm"
_LOGGER = "vllm.v1.metrics.loggers:PrometheusStatLogger"
_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_CPU_RUNNER = "vllm.v1.worker.cpu_model_runner:CPUModelRunner"
_WORKER = "vllm.v1.worker.gpu_worker:Worker"
_CPU_WORKER = "vllm.v1.worker.cpu_worker"
_BATCH = "vllm.v1.worker.gpu_input_batch"
_TABLES = "vllm.v1.worker.block_table"
_KV = "vllm.v1.kv_cache_interface"
_LAYERS = "vllm.model_executor.layers.attention"
_LORA = "vllm.lora.layers"
_RANKS = "vllm.distributed.parallel_state"
_GROUP = f"{_RANKS}:GroupCoordinator"
_LAYER_BASE = "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase"
_REGISTRY = "vllm.v1.attention.backends.registry"
_SELECTOR = "vllm.v1.attention.selector"
_BACKEND = "vllm.v1.attention.backend"
_CPU_ATTN = "vllm.v1.attention.backends.cpu_attn"
_TRITON = "vllm.v1.attention.backends.triton_attn"
_SAMPLER = "vllm.v1.sample.sampler"
_TOPK = "vllm.v1.sample.ops.topk_topp_sampler"
_SAMPLING = "vllm.v1.sample.metadata:SamplingMetadata"
_BUDGETS = "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder"
_PROCESSORS = "vllm.v1.sample.logits_processor"
_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_GRAMMARS = "vllm.v1.structured_output:StructuredOutputManager"

_FORWARD = "self layer query key value kv_cache attn_metadata output output_scale output_block_scale"
_UPDATE = "self layer key value kv_cache slot_mapping"
_BUILD = "self common_prefix_len common_attn_metadata fast_build"
_METADATA = (
    "self num_tokens num_reqs max_query_len num_tokens_padded num_reqs_padded ubatch_slices logits_indices "
    "max_num_sampled_tokens use_spec_decode for_cudagraph_capture num_scheduled_tokens slot_mappings"
)
_PROPOSE = (
    "self scheduler_output sampled_token_ids sampling_metadata hidden_states sample_hidden_states "
    "aux_hidden_states spec_decode_metadata common_attn_metadata slot_mappings"
)
_BOOKKEEPING = "self scheduler_output sampler_output logits hidden_states num_scheduled_tokens"
_IMPL = "scale logits_soft_cap sliding_window attn_type sinks alibi_slopes kv_sharing_target_layer_name"

ENTRIES: tuple[Entry, ...] = (
    *_needed_to(
        "select trees from the user's arguments",
        FRONT,
        (f"{_ARGS}.add_cli_args", OVERRIDDEN, "parser"),
        (f"{_ARGS}.create_speculative_config", OVERRIDDEN, "self target_model_config target_parallel_config"),
        (f"{_ARGS}.create_engine_config", REFERS, "create_speculative_config"),
        (_ARGS, ATTRIBUTES, "speculative_config spec_method spec_model spec_tokens additional_config worker_cls"),
        (_ARGS, ATTRIBUTES, "scheduler_cls"),
        ("vllm.config:SpeculativeConfig", ATTRIBUTES, "method model num_speculative_tokens"),
        ("vllm.platforms", ATTRIBUTES, "current_platform"),
        ("vllm.platforms.interface:Platform", ATTRIBUTES, "is_cpu is_cuda device_type device_name"),
        ("vllm.config:ParallelConfig", ATTRIBUTES, "worker_cls"),
        (_ARGS, ATTRIBUTES, "enforce_eager compilation_config cudagraph_capture_sizes max_cudagraph_capture_size"),
        (_ARGS, ATTRIBUTES, "max_num_seqs max_num_batched_tokens"),
        ("vllm.config:CompilationConfig", ATTRIBUTES, "cudagraph_capture_sizes max_cudagraph_capture_size"),
    ),
    *_needed_to(
        "refuse targets and modes without trees",
        FRONT,
        (_ARGS, ATTRIBUTES, "download_dir kv_cache_dtype enable_lora kv_transfer_config"),
        ("vllm.config:ModelConfig", ATTRIBUTES, "model architecture use_mla is_hybrid is_attention_free"),
        ("vllm.config:ModelConfig", ATTRIBUTES, "has_inner_state is_encoder_decoder is_multimodal_model uses_mrope"),
        ("vllm.config:ModelConfig", ATTRIBUTES, "enable_prompt_embeds get_hidden_size get_total_num_kv_heads"),
        ("vllm.config:ModelConfig", ATTRIBUTES, "get_head_size"),
        ("vllm.config:ModelConfig.__post_init__", STORES, "runner_type"),
        ("vllm.config:ParallelConfig", ATTRIBUTES, "pipeline_parallel_size tensor_parallel_size use_ubatching"),
        ("vllm.config:ParallelConfig", ATTRIBUTES, "decode_context_parallel_size prefill_context_parallel_size"),
        ("vllm.utils.torch_utils:resolve_kv_cache_dtype_string", CALLED, "kv_cache_dtype model_config"),
    ),
    *_needed_to(
        "count acceptance by depth",
        FRONT,
        (_LOGGER, ATTRIBUTES, "_spec_decoding_cls"),
        (f"{_LOGGER}.__init__", REFERS, "_spec_decoding_cls"),
        (_PROM, ATTRIBUTES, "_counter_cls"),
        (f"{_PROM}.__init__", OVERRIDDEN, "self speculative_config labelnames per_engine_labelvalues is_diffusion"),
        (f"{_PROM}.observe", OVERRIDDEN, "self spec_decoding_stats engine_idx"),
        ("vllm.v1.spec_decode.metrics:SpecDecodingStats", ATTRIBUTES, "num_drafts num_accepted_tokens_per_pos"),
    ),
    *_needed_to(
        "free the head's memory with the target's",
        BOTH,
        (f"{_RUNNER}.shutdown", OVERRIDDEN, "self"),
        (f"{_WORKER}.shutdown", REFERS, "shutdown"),
    ),
    *_needed_to(
        "give tree rows the positions of their depths",
        BOTH,
        (f"{_RUNNER}._prepare_inputs", OVERRIDDEN, "self scheduler_output num_scheduled_tokens"),
        # Slots are computed from positions, so that must happen before they change.
        (f"{_RUNNER}._prepare_inputs", REFERS, "compute_slot_mapping num_computed_tokens"),
        (f"{_RUNNER}.execute_model", REFERS, "_prepare_inputs"),
        (f"{_RUNNER}.__init__", STORES, "input_ids positions req_indices query_pos num_computed_tokens max_model_len"),
        ("vllm.v1.utils:CpuGpuBuffer.__init__", STORES, "gpu np"),
        (f"{_BATCH}:InputBatch", ATTRIBUTES, "req_ids"),
        (f"{_BATCH}:InputBatch.__init__", STORES, "num_computed_tokens_cpu"),
        (
            "vllm.v1.core.sched.output:SchedulerOutput",
            ATTRIBUTES,
            "scheduled_spec_decode_tokens total_num_scheduled_tokens",
        ),
    ),
    *_needed_to(
        "show every layer its trees",
        BOTH,
        (f"{_RUNNER}._build_attention_metadata", OVERRIDDEN, _METADATA),
        (f"{_RUNNER}.execute_model", REFERS, "_build_attention_metadata"),
        (f"{_RUNNER}._dummy_run", REFERS, "_build_attention_metadata"),
        (f"{_REGISTRY}:register_backend", CALLED, "backend class_path"),
    ),
    *_needed_to(
        "refuse layers without trees",
        BOTH,
        (f"{_RUNNER}.initialize_kv_cache", OVERRIDDEN, "self kv_cache_config is_profiling kv_cache_allocation_context"),
        ("vllm.config:get_layers_from_vllm_config", CALLED, "vllm_config layer_type"),
        (_LAYER_BASE, ATTRIBUTES, "impl get_attn_backend"),
        (f"{_LAYERS}:Attention.__init__", STORES, "attn_backend impl kv_cache"),
        (f"{_BACKEND}:AttentionType", ATTRIBUTES, "DECODER=decoder"),
        (f"{_BACKEND}:AttentionBackend", ATTRIBUTES, "get_impl_cls"),
        (f"{_WORKER}.__init__", STORES, "use_v2_model_runner"),
    ),
    *_needed_to(
        "walk trees with vLLM's sampler",
        BOTH,
        (f"{_RUNNER}._sample", OVERRIDDEN, "self logits spec_decode_metadata"),
        (f"{_RUNNER}.sample_tokens", REFERS, "_sample _bookkeeping_sync"),
        (f"{_RUNNER}._bookkeeping_sync", OVERRIDDEN, _BOOKKEEPING),
        (f"{_RUNNER}._bookkeeping_sync", REFERS, "discard_request_mask generators sampled_token_ids"),
        (f"{_RUNNER}.__init__", STORES, "sampler input_batch discard_request_mask"),
        (f"{_BATCH}:InputBatch.__init__", STORES, "generators sampling_metadata thinking_budget_state_holder"),
        (_SAMPLING, ATTRIBUTES, "generators output_token_ids spec_token_ids thinking_budget_state_holder"),
        (f"{_SAMPLER}:Sampler.forward", CALLED, "self * logits sampling_metadata"),
        (f"{_BUDGETS}.__init__", STORES, "in_spec_mode"),
        (_SAMPLING, ATTRIBUTES, "logitsprocs"),
        (f"{_PROCESSORS}:LogitsProcessors.__init__", CALLED, "self logitsprocs"),
        (f"{_PROCESSORS}:LogitsProcessors", ATTRIBUTES, "all"),
        (f"{_PROCESSORS}:MinTokensLogitsProcessor.__init__", STORES, "min_toks"),
        (f"{_PROCESSORS}:MinTokensLogitsProcessor.update_state", CALLED, "self batch_update"),
        # A copy with other minimums is updated by itself: what it bans is assigned anew, never changed in place.
        (f"{_PROCESSORS}:MinTokensLogitsProcessor.update_state", STORES, "logits_slice restore_logits_slice"),
        (f"{_PROCESSORS}:MinTokensLogitsProcessor.apply", REFERS, "min_toks logits_slice restore_logits_slice"),
        ("vllm.v1.outputs:SamplerOutput", CALLED, "* sampled_token_ids logprobs_tensors"),
        ("vllm.v1.outputs:LogprobsTensors", CALLED, "logprob_token_ids logprobs selected_token_ranks"),
    ),
    *_needed_to(
        "draft from the target's hidden states",
        BOTH,
        (f"{_RUNNER}.propose_draft_token_ids", OVERRIDDEN, _PROPOSE),
        (f"{_RUNNER}._input_fits_in_drafter", OVERRIDDEN, "self common_attn_metadata"),
        (f"{_RUNNER}.sample_tokens", REFERS, "_input_fits_in_drafter propose_draft_token_ids"),
        (f"{_RUNNER}._on_request_state_removed", OVERRIDDEN, "self req_id req_state"),
        (f"{_RUNNER}._update_states", REFERS, "_on_request_state_removed"),
        (f"{_RUNNER}.__init__", STORES, "requests drafter device"),
        (f"{_BATCH}:InputBatch.__init__", STORES, "token_ids_cpu_tensor"),
        (f"{_BATCH}:CachedRequestState", ATTRIBUTES, "sampling_params output_token_ids"),
        ("vllm.sampling_params:SamplingParams", ATTRIBUTES, "structured_outputs thinking_token_budget"),
        ("vllm.sampling_params:SamplingParams", ATTRIBUTES, "max_tokens"),
    ),
    *_needed_to(
        "let grammars follow the paths of trees",
        BOTH,
        ("vllm.config:SchedulerConfig.get_scheduler_cls", REFERS, "scheduler_cls"),
        ("vllm.v1.engine.core:EngineCore.__init__", REFERS, "get_scheduler_cls"),
        ("vllm.v1.engine.core:EngineCore.post_step", REFERS, "take_draft_token_ids update_draft_token_ids"),
        ("vllm.v1.engine.core:EngineCore.step", REFERS, "get_grammar_bitmask"),
        (f"{_RUNNER}.take_draft_token_ids", OVERRIDDEN, "self"),
        (f"{_RUNNER}.sample_tokens", REFERS, "apply_grammar_bitmask"),
        ("vllm.v1.outputs:DraftTokenIds", CALLED, "req_ids draft_token_ids"),
        (f"{_SCHEDULER}.__init__", STORES, "requests structured_output_manager"),
        (f"{_SCHEDULER}.update_draft_token_ids", OVERRIDDEN, "self draft_token_ids"),
        (f"{_SCHEDULER}.update_draft_token_ids", REFERS, "is_finished is_prefill_chunk spec_token_ids"),
        (f"{_SCHEDULER}.get_grammar_bitmask", OVERRIDDEN, "self scheduler_output"),
        (f"{_SCHEDULER}.get_grammar_bitmask", REFERS, "grammar_bitmask scheduled_spec_decode_tokens"),
        ("vllm.v1.core.sched.output:GrammarOutput", ATTRIBUTES, "structured_output_request_ids grammar_bitmask"),
        (f"{_GRAMMARS}.validate_tokens", CALLED, "self request spec_tokens"),
        (
            f"{_GRAMMARS}.grammar_bitmask",
            CALLED,
            "self requests structured_output_request_ids scheduled_spec_decode_tokens",
        ),
    ),
    *_needed_to(
        "load the head beside its target",
        BOTH,
        (f"{_RUNNER}.__init__", REFERS, "create_custom_proposer"),
        ("vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer", CALLED, "vllm_config"),
        (f"{_RUNNER}.load_model", REFERS, "drafter load_model"),
        ("vllm.config:VllmConfig", ATTRIBUTES, "additional_config model_config cache_config device_config"),
        ("vllm.config:ModelConfig", ATTRIBUTES, "model dtype max_model_len"),
        ("vllm.config:DeviceConfig", ATTRIBUTES, "device_type"),
        ("vllm.config:set_current_vllm_config", CALLED, "vllm_config"),
        ("vllm.utils.torch_utils:set_default_torch_dtype", CALLED, "dtype"),
        ("vllm.logger:init_logger", CALLED, "name"),
    ),
    *_needed_to(
        "draft without the adapters of its target",
        BOTH,
        (_LORA, ATTRIBUTES, "BaseLayerWithLoRA"),
        (f"{_LORA}.vocab_parallel_embedding:VocabParallelEmbeddingWithLoRA.__init__", STORES, "base_layer"),
        (f"{_LORA}.logits_processor:LogitsProcessorWithLoRA.__init__", STORES, "base_layer"),
        # Rows of trees are scheduled tokens, and so get the adapter of their request.
        (f"{_RUNNER}._prepare_inputs", REFERS, "set_active_loras"),
    ),
    *_needed_to(
        "share out the head's attention among tensor-parallel ranks",
        BOTH,
        (f"{_RANKS}:get_tensor_model_parallel_world_size", CALLED, ""),
        (f"{_RANKS}:get_tensor_model_parallel_rank", CALLED, ""),
        ("vllm.distributed.communication_op:tensor_model_parallel_all_reduce", CALLED, "input_"),
    ),
    *_needed_to(
        "verify the same trees on all tensor-parallel ranks",
        BOTH,
        (f"{_RANKS}:get_tp_group", CALLED, ""),
        (f"{_GROUP}.__init__", STORES, "world_size"),
        (f"{_GROUP}.broadcast", CALLED, "self input_"),
        # Every rank samples, so each needs all logits and the same random numbers.
        ("vllm.model_executor.layers.logits_processor:LogitsProcessor._gather_logits", REFERS, "use_all_gather"),
    ),
    *_needed_to(
        "keep the head's KV in vLLM's pages",
        BOTH,
        (
            f"{_LAYERS}:Attention.__init__",
            CALLED,
            "self * num_heads head_size scale num_kv_heads cache_config prefix",
        ),
        (f"{_LAYERS}:Attention.__init__", REFERS, "static_forward_context"),
        (_LAYER_BASE, ATTRIBUTES, "get_kv_cache_spec"),
        (f"{_RUNNER}.get_kv_cache_spec", REFERS, "get_layers_from_vllm_config get_kv_cache_spec"),
        (f"{_RUNNER}.__init__", STORES, "vllm_config compilation_config"),
        ("vllm.config:CompilationConfig", ATTRIBUTES, "static_forward_context"),
    ),
    *_needed_to(
        "adapt trees to the load",
        CPU,
        (f"{_RUNNER}.execute_model", OVERRIDDEN, "self scheduler_output intermediate_tensors"),
        (f"{_RUNNER}._dummy_run", CALLED, "self num_tokens"),
        (f"{_RUNNER}.__init__", STORES, "max_num_tokens max_num_reqs"),
        (f"{_CPU_WORKER}:CPUWorker.compile_or_warm_up_model", OVERRIDDEN, "self"),
        ("vllm.sampling_params:SamplingParams", ATTRIBUTES, "temperature"),
    ),
    *_needed_to(
        "build the CPU runner with trees",
        CPU,
        (f"{_CPU_WORKER}:CPUWorker.init_device", OVERRIDDEN, "self"),
        (_CPU_WORKER, ATTRIBUTES, "CPUModelRunner"),
        (f"{_CPU_WORKER}:CPUWorker.init_device", REFERS, "CPUModelRunner"),
        (f"{_CPU_RUNNER}.__init__", CALLED, "self vllm_config device"),
        (f"{_CPU_RUNNER}.load_model", REFERS, "drafter load_model"),
    ),
    *_needed_to(
        "attend to trees on a CPU",
        CPU,
        (f"{_REGISTRY}:AttentionBackendEnum", ATTRIBUTES, "CPU_ATTN"),
        (f"{_SELECTOR}:_cached_get_attn_backend", ATTRIBUTES, "cache_clear"),
        (f"{_CPU_ATTN}:CPUAttentionBackend.get_impl_cls", OVERRIDDEN, ""),
        (f"{_CPU_ATTN}:CPUAttentionBackend.get_builder_cls", OVERRIDDEN, ""),
        (f"{_CPU_ATTN}:CPUAttentionBackend", ATTRIBUTES, "forward_includes_kv_cache_update=False"),
        (f"{_CPU_ATTN}:CPUAttentionMetadataBuilder.build", OVERRIDDEN, _BUILD),
        (f"{_CPU_ATTN}:CPUAttentionMetadataBuilder.__init__", STORES, "isa"),
        (f"{_CPU_ATTN}:CPUAttentionMetadata", ATTRIBUTES, "block_table slot_mapping"),
        (f"{_CPU_ATTN}:CPUAttentionBackendImpl.forward", OVERRIDDEN, _FORWARD),
        (f"{_CPU_ATTN}:CPUAttentionBackendImpl.do_kv_cache_update", OVERRIDDEN, _UPDATE),
        (f"{_CPU_ATTN}:CPUAttentionBackendImpl.__init__", STORES, _IMPL),
        (f"{_LAYERS}.attention:unified_kv_cache_update", REFERS, "do_kv_cache_update"),
        (f"{_LAYERS}:Attention.__init__", STORES, "layer_name"),
        ("vllm.forward_context:get_forward_context", CALLED, ""),
        ("vllm.forward_context:ForwardContext", ATTRIBUTES, "attn_metadata"),
    ),
    *_needed_to(
        "build the CUDA runner with trees",
        CUDA,
        (f"{_WORKER}.init_device", OVERRIDDEN, "self"),
        (f"{_WORKER}.init_device", STORES, "device"),
        (f"{_WORKER}._make_model_runner", OVERRIDDEN, "self"),
        (f"{_WORKER}.init_device", REFERS, "_init_workspace_and_model_runner"),
        (f"{_WORKER}._init_workspace_and_model_runner", REFERS, "_make_model_runner"),
        ("vllm.v1.worker.worker_base:WorkerBase.__init__", STORES, "vllm_config"),
        (f"{_RUNNER}.__init__", CALLED, "self vllm_config device"),
    ),
    *_needed_to(
        "keep the head through a sleep of level 2",
        CUDA,
        (f"{_WORKER}.sleep", OVERRIDDEN, "self level"),
        (f"{_WORKER}.wake_up", OVERRIDDEN, "self tags"),
        (f"{_WORKER}._init_workspace_and_model_runner", STORES, "model_runner"),
    ),
    *_needed_to(
        "replay graphs of the draft",
        CUDA,
        (f"{_RUNNER}.profile_run", OVERRIDDEN, "self randomize_inputs"),
        (f"{_WORKER}.determine_available_memory", REFERS, "profile_run"),
        (f"{_RUNNER}.profile_cudagraph_memory", OVERRIDDEN, "self"),
        (f"{_WORKER}.determine_available_memory", REFERS, "profile_cudagraph_memory"),
        (f"{_RUNNER}.load_model", STORES, "model"),
        (f"{_RUNNER}.capture_model", OVERRIDDEN, "self"),
        (_WORKER, REFERS, "capture_model"),  # from where in it differs between versions
        (f"{_RUNNER}._sync_device", CALLED, "self"),
        (f"{_RUNNER}.__init__", STORES, "max_num_tokens max_num_reqs"),
        ("vllm.config:CUDAGraphMode", ATTRIBUTES, "NONE"),
        (f"{_RANKS}:graph_capture", CALLED, "device"),
        ("vllm.config:CompilationConfig", ATTRIBUTES, "cudagraph_mode"),
        (f"{_BATCH}:InputBatch.__init__", STORES, "block_table"),
        (f"{_TABLES}:MultiGroupBlockTable.__getitem__", CALLED, "self idx"),
        (f"{_TABLES}:BlockTable.get_device_tensor", CALLED, "self num_reqs"),
    ),
    *_needed_to(
        "attend to trees on a GPU",
        CUDA,
        (f"{_REGISTRY}:AttentionBackendEnum", ATTRIBUTES, "CUSTOM"),
        ("vllm.config:VllmConfig", ATTRIBUTES, "attention_config"),
        ("vllm.config:AttentionConfig", ATTRIBUTES, "backend"),
        (f"{_SELECTOR}:get_attn_backend", REFERS, "attention_config backend"),
        (f"{_TRITON}:TritonAttentionBackend.get_name", OVERRIDDEN, ""),
        (f"{_TRITON}:TritonAttentionBackend.get_impl_cls", OVERRIDDEN, ""),
        (f"{_TRITON}:TritonAttentionBackend.get_builder_cls", OVERRIDDEN, ""),
        (f"{_TRITON}:TritonAttentionMetadataBuilder.build", OVERRIDDEN, _BUILD),
        (f"{_TRITON}:TritonAttentionMetadataBuilder.build_for_cudagraph_capture", REFERS, "build"),
        (f"{_TRITON}:TritonAttentionMetadata", ATTRIBUTES, "num_actual_tokens max_query_len query_start_loc"),
        (f"{_TRITON}:TritonAttentionMetadata", ATTRIBUTES, "block_table slot_mapping"),
        (f"{_TRITON}:TritonAttentionImpl.forward", OVERRIDDEN, _FORWARD),
        (f"{_TRITON}:TritonAttentionImpl.do_kv_cache_update", CALLED, _UPDATE),
        (f"{_TRITON}:TritonAttentionImpl.fused_output_quant_supported", OVERRIDDEN, "self quant_key"),
        (f"{_TRITON}:TritonAttentionImpl.__init__", STORES, f"{_IMPL} head_size kv_cache_dtype fp8_dtype"),
        (f"{_LAYERS}:Attention.__init__", REFERS, "supports_quant_query_input"),
        (f"{_LAYERS}.attention:set_default_quant_scales", REFERS, "_k_scale _v_scale"),
        (f"{_LAYERS}.attention:unified_kv_cache_update", REFERS, "do_kv_cache_update"),
    ),
    *_needed_to(
        "refuse what the CUDA kernel cannot do",
        CUDA,
        (f"{_TRITON}:TritonAttentionBackend", ATTRIBUTES, "forward_includes_kv_cache_update=False"),
        (f"{_TRITON}:TritonAttentionBackend", ATTRIBUTES, "supported_kv_cache_dtypes"),
        (f"{_TRITON}:TritonAttentionBackend.supports_head_size", OVERRIDDEN, "cls head_size"),
        (f"{_TRITON}:TritonAttentionBackend.supports_attn_type", OVERRIDDEN, "cls attn_type"),
        (f"{_TRITON}:TritonAttentionBackend.supports_non_causal", OVERRIDDEN, "cls"),
        (f"{_TRITON}:TritonAttentionBackend.supports_mm_prefix", OVERRIDDEN, "cls"),
        (f"{_TRITON}:TritonAttentionBackend.supports_sink", OVERRIDDEN, "cls"),
        (f"{_TRITON}:TritonAttentionBackend.supports_rswa", OVERRIDDEN, "cls"),
        (f"{_TRITON}:TritonAttentionBackend.supports_kv_connector", OVERRIDDEN, "cls"),
        (f"{_TRITON}:TritonAttentionBackend.supports_batch_invariance", OVERRIDDEN, "cls"),
        (
            f"{_BACKEND}:AttentionBackend.validate_configuration",
            REFERS,
            "supports_head_size supports_attn_type supports_non_causal supports_mm_prefix supports_sink "
            "supports_rswa supports_kv_connector supports_batch_invariance supports_kv_cache_dtype",
        ),
        (f"{_BACKEND}:AttentionBackend.supports_kv_cache_dtype", REFERS, "supported_kv_cache_dtypes"),
    ),
    *_needed_to(
        "compact the KV cache on a GPU",
        CUDA,
        (f"{_RUNNER}.initialize_kv_cache", STORES, "kv_cache_config"),
        (f"{_KV}:KVCacheConfig", ATTRIBUTES, "kv_cache_groups"),
        (f"{_KV}:KVCacheGroupSpec", ATTRIBUTES, "layer_names"),
    ),
    *_needed_to(
        "sample all rows of a step at once",
        CUDA,
        (_SAMPLING, ATTRIBUTES, "temperature top_p top_k all_greedy all_random no_penalties"),
        (_SAMPLING, ATTRIBUTES, "bad_words_token_ids allowed_token_ids_mask max_num_logprobs logprob_token_ids"),
        (f"{_BUDGETS}.has_tracked_requests", CALLED, "self"),
        (f"{_PROCESSORS}:LogitsProcessors.__init__", STORES, "argmax_invariant non_argmax_invariant"),
        (f"{_PROCESSORS}:LogitBiasLogitsProcessor.__init__", STORES, "biases"),
        (f"{_PROCESSORS}:MinPLogitsProcessor.__init__", STORES, "min_p_count"),
        (f"{_SAMPLER}:Sampler.__init__", STORES, "topk_topp_sampler"),
        (f"{_SAMPLER}:Sampler.greedy_sample", CALLED, "logits"),
        (f"{_SAMPLER}:Sampler.apply_temperature", CALLED, "logits temp all_random"),
        (_SAMPLER, ATTRIBUTES, "_SAMPLING_EPS=1e-05"),
        (f"{_TOPK}:TopKTopPSampler.__init__", STORES, "use_fp64_gumbel"),
        (f"{_TOPK}:apply_top_k_top_p", CALLED, "logits k p"),
        (f"{_TOPK}:empty_exponential_noise_like", CALLED, "probs use_fp64_gumbel"),
        (f"{_TOPK}:sample_with_exponential_noise", CALLED, "probs q"),
    ),
)
