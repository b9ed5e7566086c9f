"""Supervised finetuning: TRL's SFTTrainer, unchanged, on the response tokens of every sample.

Differs from the trainer's defaults where they would blur a measurement: float32 without autocast, no gradient
checkpointing, a constant learning rate without warm-up, no weight decay, no dropout.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from attribution.errors import ConfigError, DataError
from attribution.recipes import Lora, Recipe, Setting


class SFT(Recipe):
    """Settings of `sft`.

    Attributes:
        max_steps: optimizer steps.
        batch_size: samples of one forward pass.
        accumulation: forward passes of one optimizer step.
        learning_rate: constant over the run.
        optimizer: a name of the trainer's optimizers, adamw_torch or sgd among them.
        max_grad_norm: the gradient is clipped to this norm; 0 does not clip.
        weight_decay: decoupled.
        disable_dropout: set every dropout of the model to zero.
        lora: adapters of low rank, trained instead of the weights where their rank is not 0.
        trainer: further arguments of trl.SFTConfig, which override the above.
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
    trainer: dict[str, Any] = Field(default_factory=dict)

    def build(self, setting: Setting) -> Any:
        import os

        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl.trainer.sft_config import SFTConfig
        from trl.trainer.sft_trainer import SFTTrainer
        from trl.trainer.utils import disable_dropout_in_model

        odd = next((e for e in setting.samples if e.weight != 1), None)
        if odd is not None:
            raise DataError(f"sft trains every sample with weight 1, one has weight {odd.weight}; leave weights out")
        if self.disable_dropout:
            disable_dropout_in_model(setting.model)
        arguments = {
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
            "activation_checkpointing": False,
            "max_length": None,
            "seed": setting.seed,
            "data_seed": setting.seed,
            "use_cpu": setting.model.device.type == "cpu",
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "save_total_limit": 2,  # of the checkpoints that the run asks for
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": not setting.progress,
            **self.trainer,
        }
        rows = [{"input_ids": list(e.ids), "labels": e.labels} for e in setting.samples]
        try:
            trainer = SFTTrainer(
                model=setting.model,
                args=SFTConfig(**arguments),
                train_dataset=Dataset.from_list(rows),
                processing_class=setting.tokenizer,
                callbacks=setting.callbacks,
                peft_config=self.lora.build(),
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"trl.SFTTrainer refuses these settings: {str(error).splitlines()[0]}") from error
        trainer.remove_callback(PrinterCallback)  # what it would print at every step is in the record
        return trainer
