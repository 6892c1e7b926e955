"""What a built model can still be made into: other parts trained, LoRA layers added, another readout,
clip tokens, more words."""

import copy

import torch

from .alignment_audiophi import AlignmentHead
from .clip_tokens import ClipTokens
from .components_audiophi import check_context
from .encoders import encoder_class
from .lora_audiophi import PARTS, inject_lora, is_lora_key, widen_lora
from .readouts import build_readout
from .spelling_audiophi import spell

TUNED = ("frozen", "lora", "full")


class TuningMixin:
    """For a model with `config`, `model` and `lm_head` as AudioPhiForConditionalGeneration has them."""

    def add_lora(self, part, arguments):
        """Add LoRA to "audio" or "text" (arguments of `peft.LoraConfig`); remembered in the config, saved in slim
        checkpoints."""
        if self.config.lora.get(part) is not None:
            raise ValueError(f"the {part} part already has LoRA layers")
        inject_lora(self.model, part, arguments)
        self.config.lora[part] = dict(arguments)
        self._remember(part, "lora")

    def widen_lora(self, part, arguments):
        """Make the LoRA layers of "audio" or "text" those of these arguments, a higher rank or another dropout, without
        a change of what they compute. Raises ValueError where there are none, or for what cannot be changed."""
        if self.config.lora.get(part) is None:
            raise ValueError(f"the {part} part has no LoRA layers: add_lora first")
        self.config.lora[part] = widen_lora(self.model, part, self.config.lora[part], arguments)

    def tune(self, part, how):
        """Make "audio" or "text" trainable: "frozen", "lora" (its LoRA layers only) or "full" (everything but LoRA
        layers stays as it is loaded; both if there are any). What was once tuned in full stays in slim
        checkpoints."""
        if part not in PARTS or how not in TUNED:
            raise ValueError(
                f"tune({part!r}, {how!r}): part is one of {', '.join(PARTS)}, how one of {', '.join(TUNED)}"
            )
        if how == "lora" and self.config.lora.get(part) is None:
            raise ValueError(f"the {part} part has no LoRA layers: add_lora first")
        modules = [getattr(self.model, PARTS[part])] + ([self.lm_head] if part == "text" else [])
        for module in modules:
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(how == "full" or (how == "lora" and is_lora_key(name)))
        if part == "audio":
            for parameter in self.model.audio_tower.layer_choice.parameters():
                parameter.requires_grad_(True)
        self._remember(part, how)

    def _remember(self, part, how):
        self.config.tuned[part] = max(self.config.tuned[part], how, key=TUNED.index)

    def resize_token_embeddings(self, new_num_tokens=None, *args, **kwargs):
        """As in transformers. Raises ValueError for a table that would lose the audio placeholder or a token that the
        alignment head scores."""
        alignment = self.model.alignment
        needed = max(self.config.audio_token_id, -1 if alignment is None else int(alignment.vocab_ids.max())) + 1
        if new_num_tokens is not None and new_num_tokens < needed:
            raise ValueError(
                f"{new_num_tokens} embeddings are too few: {needed} are needed for the audio placeholder, token "
                f"{self.config.audio_token_id}, and what the alignment head scores"
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)

    def set_readout(self, name):
        """Another readout of READOUTS instead of the present one, of which it keeps the weights that both have.

        Raises ValueError for an unknown one, or one that needs the alignment head where there is none.
        """
        config = copy.deepcopy(self.config)
        config.readout = name
        type(config)(**config.to_dict())  # checks it
        old = self.model.readout
        weight = next(old.parameters())
        self.config.readout = self.model.config.readout = name
        new = build_readout(self.config)
        self.model.readout = new.to(weight.device, weight.dtype)
        self.model.start_at_embeddings(new)
        new.load_state_dict({k: v for k, v in old.state_dict().items() if k in new.state_dict()}, strict=False)

    def set_clip_tokens(self, count):
        """Let the LLM read `count` tokens of each clip as a whole, see `clip_tokens.py`: untrained ones, where it has
        none yet.

        Raises ValueError for a model that has another number, and for more than the context holds.
        """
        if count == self.config.clip_tokens:
            return
        if self.config.clip_tokens:
            raise ValueError(f"the model has {self.config.clip_tokens} clip tokens, which cannot become {count}")
        config = copy.deepcopy(self.config)
        config.clip_tokens = count
        check_context(type(config)(**config.to_dict()))
        self.config.clip_tokens = self.model.config.clip_tokens = count
        weight = next(self.model.readout.parameters())
        encoder_size = encoder_class(config.audio_config).hidden_size(config.audio_config)
        new = ClipTokens(config.text_config.hidden_size, encoder_size, count)
        new.apply(self.model._init_weights)
        self.model.clip_tokens = new.to(weight.device, weight.dtype)
        self.model.start_at_embeddings(new)

    @torch.no_grad()
    def extend_alignment(self, vocab_ids, decode):
        """Let the alignment head score further tokens of the LLM: words of new training texts.

        A new class has the LLM's embedding and, where the head scores spelling, its n-grams, which were trained on
        other words; only its bias is unknown and begins at the others' mean.

        Args:
            vocab_ids: LLM token ids to be scored, those that already are among them or not. decode: id -> its text.
        Returns the number of new classes. Raises ValueError for a model without an alignment head.
        """
        old = self.model.alignment
        if old is None:
            raise ValueError("this model has no alignment head to extend: build it with align_vocab_ids")
        known = old.vocab_ids.tolist()
        union = sorted(set(known) | {int(index) for index in vocab_ids})
        if len(union) == len(known):
            return 0
        sizes, spellings = self.config.align_spelling, None
        if sizes:
            spellings = [spell(decode(index), sizes["buckets"]) for index in union]
            sizes = {**sizes, "entries": sum(map(len, spellings))}
        for config in (self.config, self.model.config):
            config.align_vocab_size, config.align_spelling = len(union), sizes
        new = AlignmentHead(len(union), len(old.blank), sizes).to(old.blank.device, old.blank.dtype)
        kept = {k: v for k, v in old.state_dict().items() if k not in ("bias", "vocab_ids")}
        kept = {k: v for k, v in kept.items() if k not in ("spelling.ngrams", "spelling.starts")}
        new.load_state_dict(kept, strict=False)
        new.bias.fill_(old.bias[1:].mean())
        new.bias[0] = old.bias[0]
        new.bias[torch.searchsorted(torch.tensor(union), torch.tensor(known)).to(new.bias.device) + 1] = old.bias[1:]
        new.vocab_ids.copy_(torch.tensor(union))
        if spellings:
            new.spelling.match(spellings)
        self.model.alignment = new
        return len(union) - len(known)
