"""Trains the word-level LSTM with NT-ASGD: SGD until the held-out loss stops falling, and averaged SGD from then on."""

from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from dist_asgd import NonMonotonicTrigger, ShardedASGD
from lstm import Hidden, WordLSTM
from parallel import Spread, spread
from processes import Processes
from progress import ProgressDisplay
from run import Run, for_the_user
from word_options import WordOptions
from words import WordCorpus, columns_of, rows, windows

# Random numbers of dropout are drawn from a seed for each step and rank; this many steps have seeds of their own.
_SEEDS_PER_RANK = 1 << 32


class WordTraining(Run[WordOptions]):
    """An LSTM that is trained on windows of words, of which each begins with the hidden state of the one before."""

    _format = "word-level LSTM training checkpoint 1"
    _unit = "word"
    _model: WordLSTM

    def __init__(self, options: WordOptions, processes: Processes, corpus: WordCorpus, console: Console | None) -> None:
        self._num_words = corpus.num_words
        rank, ranks = processes.rank, processes.world_size
        own = rank * options.batch, (rank + 1) * options.batch
        device = processes.device
        columns = processes.together(lambda: columns_of(corpus.train, ranks * options.batch, *own))
        self._columns = columns.to(device)
        held_out = processes.together(lambda: columns_of(corpus.held_out, ranks * options.batch, *own))
        self._held_out = held_out.to(device)
        # One more than there are steps: a step sets the learning rate of the next one.
        self._windows = windows(options.seed, options.steps + 1, len(self._columns), options.bptt)
        super().__init__(options, processes, console)
        self._trigger = NonMonotonicTrigger(self._optimizer, options.patience)
        self._hidden = self._model.first_hidden(options.batch)

    def _make_model(self) -> WordLSTM:
        options = self._options
        shape = self._num_words, options.width, options.hidden, options.layers
        return WordLSTM(*shape, options.drop, options.weight_drop).to(self._processes.device)

    def _spread_model(self) -> Spread:
        return spread(self._model, self._options.mode, None, 1, self._processes)

    def _make_optimizer(self) -> ShardedASGD:
        options = self._options
        return ShardedASGD(
            self._model.named_parameters(),
            lr=self._lr_of(0),
            lambd=0.0,  # the step size of NT-ASGD does not decay
            weight_decay=options.weight_decay,
            bucket_cap_mb=options.bucket_cap_mb,
            **self._spread.optimizer_options,
        )

    def _lr_of(self, step: int) -> float:
        """The learning rate of the step after `step` steps: in proportion to its window, as a sum of losses has it."""
        return self._options.lr * self._windows[step].length / self._options.bptt

    def _train_step(self) -> Tensor:
        options, window = self._options, self._windows[self._step]
        if window.start == 0:
            self._hidden = self._model.first_hidden(options.batch)
        # Dropout of a step depends on its number and the rank only, so that a resumed run draws the same.
        torch.manual_seed(self._processes.rank * _SEEDS_PER_RANK + options.seed + self._step)
        self._optimizer.zero_grad()
        loss, self._hidden = self._spread.network(*rows(self._columns, window), self._hidden)
        loss.backward()
        if options.clip:
            self._optimizer.clip_grad_norm_(options.clip)
        # ASGD stores its step size for the next step: what is set now acts there.
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr_of(self._step + 1)
        self._optimizer.step()
        return loss.detach()  # type: ignore[no-any-return]

    def _step_tokens(self) -> int:
        # The step has been counted already.
        return self._windows[self._step - 1].length * self._options.batch * self._processes.world_size

    def _learning_rate(self) -> float:
        return self._lr_of(self._step - 1)

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """The mean loss in nats per word over the held-out columns, which the ranks divide among them."""
        self._model.eval()
        hidden = self._model.first_hidden(self._options.batch)
        num_rows = len(self._held_out) - 1
        total = 0.0
        for start in range(0, num_rows, self._options.bptt):
            stop = min(start + self._options.bptt, num_rows)
            loss, hidden = self._model(self._held_out[start:stop], self._held_out[start + 1 : stop + 1], hidden)
            total += loss.item() * (stop - start)
        self._model.train()
        # Ranks have equally many words.
        (loss_sum,) = self._processes.total(total / num_rows)
        return loss_sum / self._processes.world_size

    def _after_evaluation(self, progress: ProgressDisplay) -> None:
        assert self._evaluation is not None
        with for_the_user():
            begins = self._trigger.update(self._evaluation.last)
        if begins:
            progress.note(
                f"step {self._step}: the held-out loss is above the lowest one before the last "
                f"{self._options.patience} evaluations, so averaging begins"
            )

    def _kept(self) -> dict[str, Any]:
        # A checkpoint keeps what each rank gives, and with it each rank's hidden state.
        return {"trigger": self._trigger.state_dict(), "hidden": self._hidden, "ranks": self._processes.world_size}

    def _take(self, content: dict[str, Any]) -> None:
        self._trigger.load_state_dict(content["trigger"])
        # On another number of ranks the columns are others, and their hidden state begins anew.
        if content["ranks"] == self._processes.world_size:
            hidden: Hidden = content["hidden"]
            self._hidden = [(h.to(self._processes.device), c.to(self._processes.device)) for h, c in hidden]
