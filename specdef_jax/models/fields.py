"""Reading a config.json field by field, so that none that matters is passed over.

A field that the reader did not ask for, is not known to be harmless, and is set to something, is refused by
name: it may change the architecture, and a network that is built without it computes something else.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from specdef_jax.errors import ConfigError

# What says nothing about the function: where a model comes from, how it is trained, sampled or stored.
_TOLD_ELSEWHERE = """
    _attn_implementation _name_or_path architectures attention_dropout attn_implementation auto_map
    bos_token_id chunk_size_feed_forward decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id finetuning_task id2label
    initializer_range is_llama_config
    label2id length_penalty max_length max_position_embeddings min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_router_logits pad_token_id prefix pretraining_tp problem_type remove_invalid_values
    repetition_penalty resid_pdrop return_dict return_dict_in_generate rope_interleaved
    router_aux_loss_coef sep_token_id task_specific_params temperature tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p unk_token_id use_bfloat16 use_cache
"""
HARMLESS = frozenset(_TOLD_ELSEWHERE.split())


class Fields:
    """The fields of a config that are still to be read.

    Args:
      found: config.json.
      model: what error messages call the model.
    """

    def __init__(self, found: Mapping[str, Any], model: str) -> None:
        self._left, self._model = dict(found), model

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or the default where it is absent or null."""
        value = self._left.pop(name, None)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """Return a positive integer.

        Raises:
          ConfigError: the field is absent, without a default, or no positive integer.
        """
        value = self.get(name, default)
        if value is None:
            raise self.error(name, value, "is needed, and is not filled in from another size")
        if type(value) is not int or value < 1:
            raise self.error(name, value, "must be a positive integer")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a positive finite number.

        Raises:
          ConfigError: the field is absent, without a default, or no such number.
        """
        value = self.get(name, default)
        if value is None:
            raise self.error(name, value, "is needed")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self.error(name, value, "must be a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false.

        Raises:
          ConfigError: the field is neither.
        """
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, value, "must be true or false")
        return value

    def one_of(self, name: str, allowed: Collection[str], default: str | None = None) -> str:
        """Return one of some words.

        Raises:
          ConfigError: the field is another.
        """
        value = self.get(name, default)
        if value not in allowed:
            raise self.error(name, value, f"must be one of {', '.join(map(repr, sorted(allowed)))}")
        return value

    def finish(self, harmless: Collection[str] = HARMLESS) -> None:
        """Refuse what was not read, unless it is harmless, or null, false or empty.

        Raises:
          ConfigError: for the first such field.
        """
        for name, value in self._left.items():
            if name not in harmless and value not in (None, False, [], {}, ""):
                raise self.error(
                    name, value, "is not known here and may change the architecture; remove it if it does not"
                )

    def error(self, name: str, value: Any, why: str) -> ConfigError:
        """Return the error that a field has this value."""
        told = "is absent" if value is None else f"is {value!r}"
        return ConfigError(f"config of {self._model}: '{name}' {told}: it {why}.")
