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
HARMLESS = frozenset(
    """_name_or_path _attn_implementation architectures attn_implementation bos_token_id eos_token_id
    pad_token_id unk_token_id sep_token_id decoder_start_token_id transformers_version torch_dtype dtype
    use_cache initializer_range attention_dropout resid_pdrop embd_pdrop pretraining_tp return_dict
    output_attentions output_hidden_states id2label label2id problem_type task_specific_params
    finetuning_task prefix torchscript use_bfloat16 chunk_size_feed_forward tokenizer_class
    router_aux_loss_coef output_router_logits max_position_embeddings do_sample temperature top_k top_p
    typical_p repetition_penalty length_penalty num_beams num_beam_groups num_return_sequences max_length
    min_length diversity_penalty early_stopping encoder_no_repeat_ngram_size no_repeat_ngram_size
    remove_invalid_values return_dict_in_generate is_llama_config auto_map rope_interleaved
    """.split()
)


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
