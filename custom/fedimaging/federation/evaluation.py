"""Cross-site evaluation: the best and the last global model on every site's test split."""

from typing import Annotated, Any

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import AppConstants, DefaultCheckpointFileName
from nvflare.app_common.widgets.validation_json_generator import ValidationJsonGenerator
from nvflare.app_common.workflows.cross_site_model_eval import CrossSiteModelEval
from nvflare.app_opt.pt.file_model_locator import PTFileModelLocator
from pydantic import Field

from fedimaging.federation.protocol import EVALUATE_AT, PERSISTOR_ID
from fedimaging.settings import Settings, parse

MODEL_NAMES = {
    DefaultCheckpointFileName.GLOBAL_MODEL: "last",
    DefaultCheckpointFileName.BEST_GLOBAL_MODEL: "best",
}


class EvaluationSettings(Settings):
    timeout: Annotated[int, Field(ge=1, le=7 * 24 * 3600)] = 3600
    """seconds that a site has for one model"""
    site_models: bool = False
    """whether each site's own model is evaluated at every site too; sites give theirs only with a strategy that does"""


class GlobalModels(PTFileModelLocator):
    """The persistor's two models under the names that the report uses: ``last`` and ``best``."""

    def get_model_names(self, fl_ctx: FLContext) -> list[str]:
        return [MODEL_NAMES[name] for name in super().get_model_names(fl_ctx) if name in MODEL_NAMES]

    def locate_model(self, model_name: str, fl_ctx: FLContext) -> Any:
        file_name = next(name for name, short in MODEL_NAMES.items() if short == model_name)
        return super().locate_model(file_name, fl_ctx)


class CrossSiteEvaluation(CrossSiteModelEval):
    """FLARE's cross-site evaluation of the server's models and, if asked for, of the sites'; they answer aggregates.

    The results are ``cross_site_val/cross_val_results.json`` in the server's job folder:
    ``{site: {"SRV_best": figures, "SRV_last": figures, "<site whose model it is>": figures}}``.
    """

    def __init__(self, timeout: int = 3600, site_models: bool = False) -> None:
        settings = parse(EvaluationSettings, {"timeout": timeout, "site_models": site_models}, "evaluation")
        super().__init__(
            task_check_period=0.1,
            submit_model_task_name=AppConstants.TASK_SUBMIT_MODEL if settings.site_models else "",
            submit_model_timeout=settings.timeout,
            validation_timeout=settings.timeout,
        )
        self.timeout, self.site_models = settings.timeout, settings.site_models
        self._writer = ValidationJsonGenerator()

    def start_controller(self, fl_ctx: FLContext) -> None:
        self._participating_clients = fl_ctx.get_prop(EVALUATE_AT)
        super().start_controller(fl_ctx)
        self._model_locator = GlobalModels(PERSISTOR_ID)
        self._model_locator._initialize(fl_ctx)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        self._writer.handle_event(event_type, fl_ctx)
