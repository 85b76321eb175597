"""The Client API loop that the executor runs at a site: train, validate, submit_model, or a refusal."""

import logging

import nvflare.client as flare
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

from fedimaging.federation.protocol import COUNTED, REPORT, VALIDATE_LAST, to_parameters, to_state
from fedimaging.federation.session import AbortedError, Session

log = logging.getLogger("fedimaging.federation.client_loop")


def main() -> None:
    session = Session.current
    if session is None:
        raise RuntimeError("client_loop.py is run by TrainerExecutor, not by hand")
    flare.init()
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        try:
            reply = answer(session, model)
        except AbortedError:
            log.info("told to stop; this site's part in the job ends")
            return
        except Exception as error:
            # Whatever goes wrong, the server learns a code of it and this site stays fit for the next task.
            session.refuse(error)
            reply = FLModel(metrics={"refused": 1.0})
        flare.send(reply)


def answer(session: Session, model: FLModel) -> FLModel:
    """The reply to the task at hand; ``model`` carries the global weights, but for submit_model."""
    if flare.is_submit_model():
        return FLModel(params=to_parameters(session.last_state()), params_type=ParamsType.FULL)
    state = to_state(model.params or {})
    if flare.is_evaluate():
        if model.meta.get(VALIDATE_LAST):
            return FLModel(metrics=session.validation_metrics(state) or {"cases": 0})
        return FLModel(metrics=session.evaluation(state))
    counted = model.meta.get(COUNTED)
    result, metrics = session.train(state, model.current_round or 0, model.total_rounds or 1, counted)
    return FLModel(
        params=to_parameters(result.sent),
        params_type=ParamsType.FULL,
        metrics=metrics,
        meta={FLMetaKey.NUM_STEPS_CURRENT_ROUND: result.cases, REPORT: session.figures(result)},
    )


if __name__ == "__main__":
    main()
