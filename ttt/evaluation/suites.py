"""Name -> suite: the one place that a new suite is entered in (and `ttt.knobs.SUITES`)."""

from ttt.evaluation.long_decoding import LongDecoding
from ttt.evaluation.loss_by_context import LossByContext
from ttt.evaluation.needles import Needles
from ttt.evaluation.suite import AbstractSuite

SUITES: dict[str, type[AbstractSuite]] = {
    suite.name: suite for suite in (LossByContext, Needles, LongDecoding)
}
