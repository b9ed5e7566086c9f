"""What the recipes on TRL's trainers share: settings, the trainer's arguments, and who is switched off while it runs.

Differs from the trainers' defaults where they would blur a measurement: float32 without autocast, no gradient
checkpointing, a constant learning rate without warm-up, no weight decay, no dropout. Knows nothing about losses.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from attribution.errors import ConfigError
from attribution.recipes import Lora, Recipe, Setting, Settings


class Intervention(Settings):
    """A named set of components that is switched off in some passes of a training, and in no others.

    Attributes:
        components: name of one of the run's sets; empty: there is no intervention.
        sampling: of the passes that sample completions, and of those that say how probable they were to the sampler.
        updating: of the passes that are differentiated. stopped: the set is active and its own parameters get no
            gradient. The reference model of a KL penalty or a preference loss is always intact.
        reference: what ablated activations become: zero, or the mean over counterfactuals of the model before training.
    """

    components: str = ""
    sampling: Literal["intact", "ablated"] = "intact"
    updating: Literal["intact", "stopped", "ablated"] = "intact"
    reference: Literal["zero", "mean"] = "zero"

    @property
    def idle(self) -> bool:
        return (self.sampling, self.updating) == ("intact", "intact")

    def check(self, setting: Setting, *, samples: bool, adapters: bool) -> None:
        """Refuse what cannot be done.

        Args:
            setting: what is trained.
            samples: whether the recipe samples completions.
            adapters: whether it trains adapters.

        Raises:
            ConfigError: a set that is missing or named for nothing, or passes that the recipe does not have.
        """
        if bool(self.components) == self.idle:
            raise ConfigError(
                f"intervention: components {self.components!r} with sampling {self.sampling} and updating {self.updating}; "
                "name a set and say where it is ablated or stopped, or leave all three out"
            )
        if not self.components:
            return
        if self.components not in setting.sets:
            raise ConfigError(
                f"intervention: there is no set {self.components!r}; expected one of the run's sets "
                f"({', '.join(setting.sets) or 'it has none: give --sets'})"
            )
        if setting.sets[self.components].empty:
            raise ConfigError(f"intervention: the set {self.components!r} has no members; name one that has")
        if (setting.sets[self.components]["kind"] == "row").any():
            raise ConfigError(
                f"intervention: the set {self.components!r} holds unembedding rows, past whose module trainers compute; name a "
                "set of heads and neurons"
            )
        if self.reference == "mean" and not setting.neutral:
            raise ConfigError("intervention: the mean is over counterfactuals, and there are none; give --counterfactuals")
        if self.sampling == "ablated" and not samples:
            raise ConfigError("intervention: this recipe samples nothing while it trains, so that nothing can be ablated then")
        if self.updating == "stopped" and adapters:
            raise ConfigError(
                "intervention: heads and neurons share the matrices of an adapter, whose gradient cannot be stopped for some "
                "alone; set lora.rank to 0, or updating to ablated"
            )


class TrainerRecipe(Recipe):
    """Settings that every recipe on a trainer of TRL has.

    Attributes:
        max_steps: optimizer steps.
        batch_size: samples of one forward pass: pairs for dpo, completions where they are sampled.
        accumulation: forward passes of one optimizer step.
        learning_rate: constant over the run; 0 is the control that moves nothing.
        optimizer: a name of the trainer's optimizers, adamw_torch or sgd among them.
        max_grad_norm: the gradient is clipped to this norm; 0 does not clip.
        weight_decay: decoupled.
        disable_dropout: set every dropout of the model to zero.
        lora: adapters of low rank, trained instead of the weights where their rank is not 0.
        intervention: a set of components that is ablated or gets no gradient in some passes.
        trainer: further arguments of TRL's config, which override the above.
    """

    max_steps: int = Field(default=20, ge=1)
    batch_size: int = Field(default=32, ge=1)
    accumulation: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-4, ge=0, allow_inf_nan=False)
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "rmsprop"] = "adamw_torch"
    max_grad_norm: float = Field(default=1.0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    disable_dropout: bool = True
    lora: Lora = Field(default_factory=Lora)
    intervention: Intervention = Field(default_factory=Intervention)
    trainer: dict[str, Any] = Field(default_factory=dict)

    def check(self, setting: Setting) -> None:
        self.intervention.check(setting, samples=False, adapters=self.lora.rank > 0)

    def assembled(self, setting: Setting, trainer: Any, config: Any, arguments: dict[str, Any], **given: Any) -> Any:
        """The trainer, of a class of TRL, a subclass of one or of `recipes.phases`, with these settings.

        It is told which of its passes are updates where a set is switched off in those, unless it knows already.

        Args:
            setting: what to train.
            trainer, config: the two classes.
            arguments: of the config, beside those that all recipes share.
            given: further arguments of the trainer.

        Raises:
            ConfigError: settings that the trainer refuses.
        """
        import torch
        from transformers import PrinterCallback

        if self.disable_dropout:
            _without_dropout(setting.model)
        if not self.intervention.idle and not hasattr(trainer, "phases"):
            from attribution.recipes.phases import Phases, phased

            trainer = phased(trainer, Phases(self.intervention, setting))
        if setting.model.device.type == "cuda":
            torch.cuda.set_device(setting.model.device)  # trainers take the current one
        try:
            args = config(**{**self._shared(setting), **arguments, **self.trainer})
            args._n_gpu = min(args.n_gpu, 1)  # of several GPUs the model is on one: no replicas
            made = trainer(
                model=setting.model,
                args=args,
                processing_class=setting.tokenizer,
                callbacks=setting.callbacks,
                peft_config=self.lora.build(),
                **given,
            )
        except (TypeError, ValueError) as error:
            name = config.__name__.removesuffix("Config")
            raise ConfigError(f"trl.{name}Trainer refuses these settings: {str(error).splitlines()[0]}") from error
        made.remove_callback(PrinterCallback)  # what it would print at every step is in the record
        return made

    def _shared(self, setting: Setting) -> dict[str, Any]:
        return {
            "output_dir": str(setting.directory),
            "max_steps": self.max_steps,
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "learning_rate": self.learning_rate,
            "optim": self.optimizer,
            "max_grad_norm": self.max_grad_norm,
            "weight_decay": self.weight_decay,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "bf16": False,
            "fp16": False,
            "activation_checkpointing": self.trainer.get("gradient_checkpointing", False),  # its older name
            "seed": setting.seed,
            "data_seed": setting.seed,
            "use_cpu": setting.model.device.type == "cpu",
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": not setting.progress,
        }


def _without_dropout(model: Any) -> None:
    from trl.trainer.utils import disable_dropout_in_model

    disable_dropout_in_model(model)
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):  # a number, not a module, in most families
            module.attention_dropout = 0.0
