"""What privacy costs on real sets and real bases, through the service: private, not private, untrained.

    PRIVTUNE_MODELS_DIR=… python -m benchmarks.quality DATA RESULTS.jsonl [--only stsb,weibo_ner] [--epsilons none,3,8]
    python -m benchmarks.quality --table RESULTS.jsonl
    python -m benchmarks.quality --make-masked MODELS/minilm-masked

Training rows are private (δ = 1e-5) or, without a mechanism, public; test rows are public, so that metrics are exact.
One job at a time; each one that ended is a line of RESULTS.jsonl, and a run that was cut off goes on behind it.
--validation measures on the validation rows instead, for what is chosen before the test rows are looked at; --set adds
to the requests. The sets' readers and slices are in `benchmarks.quality_sets`. --make-masked builds the base of the
rows with masked_lm, see `benchmarks.masked_base`; the other bases that no package of this project carries are folders
of PRIVTUNE_MODELS_DIR by the names below.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import masked_base
from benchmarks import quality_sets as sets
from benchmarks.quality_sets import MINILM, Part, Row, Workload
from tests.running import Running, wait_for_job

DELTA = 1e-5
ACCURACY = {"accuracy": 100.0, "f1_macro": 100.0}
WRITING = {"loss": 1.0, "token_accuracy": 100.0}
WRITTEN = {"loss": 1.0, "rougeL": 100.0, "chrf": 1.0}

#: Names of metrics in the table, where they are not their keys'.
_SHOWN = {
    "f1_macro": "macro F1", "f1_micro": "micro F1", "entity_f1": "entity F1", "rmse": "RMSE", "rougeL": "ROUGE-L",
    "chrf": "chrF",
}  # fmt: skip

_SMOLLM2, _FLAN_T5, _CHINESE = "smollm2-135m-instruct", "flan-t5-small", "bert-base-chinese"

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("sst2", "SST-2, 6,920", MINILM, sets.sst2, {"type": "text_classification"}, ACCURACY),
        Workload("sms_spam", "SMS spam, 3,619", MINILM, sets.sms_spam, {"type": "text_classification"}, ACCURACY),
        Workload(
            "goemotions_all",
            "GoEmotions, several of 28 labels, 43,410",
            MINILM,
            sets.goemotions(43_410, 5427),
            {"type": "text_classification"},
            {"f1_micro": 100.0, "f1_macro": 100.0},
        ),
        Workload(
            "goemotions",
            "GoEmotions, several of 28 labels, 15,000 of 43,410",
            MINILM,
            sets.goemotions(15_000, 3000),
            {"type": "text_classification"},
            {"f1_micro": 100.0, "f1_macro": 100.0},
            settings={"adaptation": {"type": "head"}},
        ),
        Workload(
            "stsb",
            "STS-B en, regression on pairs, 5,749",
            MINILM,
            sets.stsb,
            {"type": "text_regression", "range": [0.0, 5.0]},
            {"correlation": 100.0, "rmse": 1.0},
        ),
        Workload(
            "cifar10",
            "CIFAR-10, 2,000",
            "efficientnet-lite0",
            sets.cifar10,
            {"type": "image_classification"},
            ACCURACY,
        ),
        Workload(
            "weibo_ner",
            "Weibo NER, 1,350",
            _CHINESE,
            sets.weibo_ner,
            {"type": "token_classification"},
            {"entity_f1": 100.0, "f1_macro": 100.0},
        ),
        Workload(
            "e2e_friendly",
            "E2E, family-friendly or not, 2,000",
            "minilm-masked",
            sets.e2e_friendly(2000, 1000),
            {"type": "text_classification"},
            ACCURACY,
        ),
        Workload(
            "e2e_masked",
            "E2E, masked_lm on 800 texts",
            "minilm-masked",
            sets.e2e_text(800, 100),
            {"type": "masked_lm"},
            WRITING,
            settings={"hyperparameters": {"n_epochs": 2}},
        ),
        Workload(
            "e2e_friendly_adapted",
            "E2E, family-friendly or not, behind masked_lm",
            "minilm-masked",
            sets.e2e_friendly(2000, 1000),
            {"type": "text_classification"},
            ACCURACY,
            after="e2e_masked",
        ),
        Workload(
            "scitldr",
            "SciTLDR, 240 of 1,992, the first 128 tokens",
            _FLAN_T5,
            sets.scitldr(240, 32),
            {"type": "summarization", "max_length": 128, "max_target_length": 48},
            WRITTEN,
            settings={"hyperparameters": {"n_epochs": 1, "batch_size": 32}},
        ),
        Workload(
            "e2e_nlg",
            "E2E NLG, 500 of 42,061",
            _SMOLLM2,
            sets.e2e_nlg(500, 60),
            {"type": "instruction", "max_length": 128},
            WRITING,
            settings={"hyperparameters": {"n_epochs": 1, "batch_size": 64}},
        ),
        Workload(
            "dolly15k",
            "Dolly, 300 of those up to 400 characters",
            _SMOLLM2,
            sets.dolly(300, 60, 400),
            {"type": "instruction", "max_length": 128},
            WRITING,
            settings={"hyperparameters": {"n_epochs": 1, "batch_size": 64}},
        ),
    )
}


class Bench:
    """A running service, the sets, and the file of results."""

    def __init__(self, service: Running, data: Path, results: Path, scratch: Path, options: argparse.Namespace) -> None:
        self.service, self.client = service, service.client(timeout=600)
        self.data, self.results, self.scratch = data, results, scratch
        self.part: Part = "valid" if options.validation else "test"
        self.extra: dict[str, Any] = json.loads(options.set)
        self.files: dict[tuple[str, bool], str] = {}
        self.done = read_results(results)

    def run(self, workload: Workload, epsilon: float | None, seed: int, *, untrained: bool = False) -> Any:
        """One job, unless the file has it; the model's id, None where it did not run or failed.

        untrained: three steps on a dozen rows at a vanishing rate.
        """
        mark = {
            "workload": workload.name,
            "epsilon": "untrained" if untrained else epsilon,
            "seed": seed,
            "part": self.part,
            "set": self.extra,
        }
        if any(mark.items() <= line.items() for line in self.done):
            return None
        base = workload.base
        if workload.after is not None:
            made = self.run(WORKLOADS[workload.after], epsilon, seed)
            if made is None:
                print(f"{workload.name}: its base was trained by an earlier run; remove that line to go on")
                return None
            base = made
        private = epsilon is not None
        settings = merged(workload.settings, workload.private if private else workload.plain, self.extra)
        if untrained:
            settings = {"hyperparameters": {"n_epochs": 3, "batch_size": 12, "learning_rate_multiplier": 1e-3}}
        began = time.monotonic()
        job = self.client.fine_tuning.jobs.create(
            model=base,
            training_file=self.file(workload, "train", public=not private, untrained=untrained),
            validation_file=self.file(workload, self.part, public=True),
            seed=seed,
            extra_body=merged(
                {
                    "task": workload.task,
                    "privacy": {"target_epsilon": epsilon, "target_delta": DELTA} if private else {"mechanism": "none"},
                },
                settings,
            ),
        )
        job = wait_for_job(self.client, job.id, 4 * 3600)
        told = {**job.model_extra, "hyperparameters": job.to_dict().get("hyperparameters")}
        line = {
            **mark,
            "seconds": round(time.monotonic() - began, 1),
            "status": job.status,
            "error": job.to_dict().get("error"),
            "hyperparameters": told["hyperparameters"],
            "adaptation": told.get("adaptation"),
            "metrics": {},
        }
        if job.status == "succeeded":
            metrics = (self.client.models.retrieve(job.fine_tuned_model).model_extra or {})["metrics"]
            line["metrics"] = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
            self.done.append(line)
            with self.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        shown = {key: round(line["metrics"].get(key, float("nan")), 4) for key in workload.headline}
        print(mark, line["status"], line["error"] if not line["metrics"] else "", f"{line['seconds']} s", shown)
        return job.fine_tuned_model

    def file(self, workload: Workload, part: Part, *, public: bool, untrained: bool = False) -> str:
        """The id of the upload, made once. Public ones come first: bytes that were protected cannot become public."""
        content = workload.read(self.data, part)
        if untrained and not isinstance(content, bytes):
            content = sets.spread(content, 12)
        ending = "zip" if isinstance(content, bytes) else "jsonl"
        content = content if isinstance(content, bytes) else lines(content)
        digest = hashlib.sha256(content).hexdigest()
        path = self.scratch / f"{digest[:16]}.{ending}"
        path.write_bytes(content)
        for says in (True, public):  # another workload, or seed, may want the same rows without privacy later
            if (digest, says) not in self.files:
                uploaded = self.client.files.create(
                    file=path, purpose="fine-tune", extra_body={"public": "true"} if says else None
                )
                file = self.client.files.wait_for_processing(uploaded.id, poll_interval=0.2, max_wait_seconds=900)
                assert file.status == "processed", file
                self.files[digest, says] = str(file.id)
        return self.files[digest, public]

    def reference(self, workload: Workload) -> None:
        """The row without training: the largest class or the mean; of texts, the base as it is."""
        shares = sets.chance(workload.read(self.data, self.part))
        if not shares:
            self.run(workload, None, 0, untrained=True)
            return
        mark = {"workload": workload.name, "epsilon": "untrained", "seed": 0, "part": self.part, "set": {}}
        if not any(mark.items() <= line.items() for line in self.done):
            self.done.append({**mark, "metrics": shares})
            with self.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.done[-1]) + "\n")


def merged(*bodies: dict[str, Any]) -> dict[str, Any]:
    """Blocks of the later ones over those of the earlier ones, key by key."""
    out: dict[str, Any] = {}
    for body in bodies:
        for key, value in body.items():
            both = isinstance(value, dict) and isinstance(out.get(key), dict)
            out[key] = {**out[key], **value} if both else value
    return out


def lines(rows: list[Row]) -> bytes:
    """JSON lines."""
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def read_results(path: Path) -> list[dict[str, Any]]:
    """What earlier runs wrote."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def print_table(done: list[dict[str, Any]]) -> None:
    """Markdown: a line a workload and metric; the mean over seeds, and each seed's value in brackets."""
    print("| set, rows | base, adaptation | metric | untrained | ε = 3 | ε = 8 | not private |")
    print("|---|---|---|---|---|---|---|")
    for workload in WORKLOADS.values():
        mine = [line for line in done if (line["workload"], line["part"], line["set"]) == (workload.name, "test", {})]
        adaptations = {line["adaptation"]["type"].replace("_", " ") for line in mine if line.get("adaptation")}
        for key, factor in workload.headline.items():
            cells = []
            for epsilon in ("untrained", 3.0, 8.0, None):
                ran = [line["metrics"] for line in mine if line["epsilon"] == epsilon]
                found = [metrics[key] * factor for metrics in ran if key in metrics]
                digits = 1 if factor == 100.0 else 2
                each = f" ({', '.join(f'{value:.{digits}f}' for value in found)})" if len(found) > 1 else ""
                cells.append(f"{sum(found) / len(found):.{digits}f}{each}" if found else "–")
            base = ", ".join([workload.base, *sorted(adaptations)])
            shown = _SHOWN.get(key, key.replace("_", " "))
            print(f"| {workload.title} | {base} | {shown} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("results", type=Path, nargs="?")
    parser.add_argument("--table", type=Path, help="print the table of these results, and nothing else")
    parser.add_argument("--make-masked", type=Path, metavar="FOLDER", help="build that base, and nothing else")
    parser.add_argument("--only", default=",".join(WORKLOADS), help=f"of {', '.join(WORKLOADS)}")
    parser.add_argument("--epsilons", default="none,3,8")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--validation", action="store_true")
    parser.add_argument("--set", default="{}", help="JSON, merged into every request")
    options = parser.parse_args()
    if options.table is not None:
        print_table(read_results(options.table))
        return
    if options.make_masked is not None:
        masked_base.make(options.make_masked)
        return
    if options.data is None or options.results is None:
        parser.error("DATA and RESULTS.jsonl are needed")
    told = ("PRIVTUNE_MODELS_DIR", "PRIVTUNE_PRECISION", "PRIVTUNE_MAX_PHYSICAL_BATCH_TOKENS")
    settings = {name: os.environ[name] for name in told if name in os.environ}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        limits = {"PRIVTUNE_BUDGET_EPSILON": "1000", "PRIVTUNE_BUDGET_DELTA": str(DELTA), "PRIVTUNE_THREADS": "1"}
        with Running(folder / "data", **limits, **settings) as service:
            bench = Bench(service, options.data, options.results, folder, options)
            for workload in (WORKLOADS[name] for name in options.only.split(",")):
                bench.reference(workload)
                for seed in range(options.seeds):
                    for said in options.epsilons.split(","):
                        bench.run(workload, None if said == "none" else float(said), seed)


if __name__ == "__main__":
    main()
