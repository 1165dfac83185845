"""The help of `train`, whose many options stand under headings."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

SECTIONS = {
    "Run": "out preset config resume overwrite processes device seed imports",
    "Data": "data limit eval_limit validation resize crop data_cache augment extra_data extra_ratio epoch_images",
    "Model": "model channels_last precision",
    "Teacher": "teacher teacher_model teacher_normalize teacher_weights_key",
    "Method": (
        "method settings alpha beta begin_epoch detach_target temperature reduction scale_by_t2 teacher_input "
        "label_smoothing"
    ),
    "Attack": (
        "eps norm steps step_size early_steps attack_init attack_bn teacher_gradient lean awp awp_gamma awp_warmup"
    ),
    "Optimisation": (
        "epochs batch_size accumulate lr momentum nesterov weight_decay clip_grad schedule milestones peak "
        "warmup_epochs ema swa_start"
    ),
    "Measuring and saving": "eval_every monitor_images save_every save_safetensors tensorboard",
}


class SectionedHelp(TyperCommand):
    """A command whose options are listed under the headings of `SECTIONS`; what has none comes last."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        records = {parameter.name: parameter.get_help_record(ctx) for parameter in self.get_params(ctx)}
        for title, names in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([records.pop(name) for name in names.split()])
        with formatter.section("Options"):
            formatter.write_dl(list(records.values()))
