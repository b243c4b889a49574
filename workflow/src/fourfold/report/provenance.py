"""What made the numbers: a row an engine, and the sentences that a reader must not miss."""

import json
from collections.abc import Mapping
from typing import Any

from fourfold.report.data import EngineBenchmark, Results, Row

FEW_ANSWERS = 100
"""Answers below which an accuracy is said to rest on few: its error is 5 % and more at 50 %."""
UNITS = ("B", "kB", "MB", "GB", "TB")


def provenance_rows(results: Results) -> list[Row]:
    """One row an engine: model, precision, weights, drafter, device, versions, commit and settings, all as text."""
    return [_row(engine) for engine in results.engines]


def _row(engine: EngineBenchmark) -> Row:
    info, manifest, provenance = engine.manifest["engine_info"], engine.manifest, engine.provenance
    settings = manifest["settings"]["benchmark"]
    target = info["weight_bytes"]
    drafter = {
        dtype: rest
        for dtype, amount in manifest["engine_tensor_bytes"].items()
        if (rest := amount - target.get(dtype, 0))
    }
    first = engine.rows[0]
    libraries = ", ".join(f"{name} {version}" for name, version in provenance["libraries"].items())
    return {
        "engine": engine.name,
        "model": describe_model(manifest["model"]),
        "precision": info["precision"],
        "compute dtype": info["compute_dtype"],
        "weights": by_dtype(info["weight_bytes"]),
        "drafter": info["drafter"] if info["drafter"] == "none" else f"{info['drafter']}, {by_dtype(drafter)}",
        "backend": info["backend"],
        "engine settings": plain(
            {k: v for k, v in manifest["engine_settings"].items() if k not in ("precision", "drafter", "backend")}
        ),
        "device": provenance["device"],
        "peak memory": size(max(row["peak_memory_bytes"] for row in engine.rows)),
        "load time": f"{first['load_time']:.1f} s",
        "workload": plain(settings),
        "prompt": plain(manifest["settings"]["prompt"]),
        "date": str(first["date"]),
        "versions": f"fourfold {provenance['fourfold']['version']}, {libraries}",
        "commit": str(provenance["fourfold"]["commit"]),
    }


def describe_model(model: Mapping[str, Any]) -> str:
    """The model's architecture and shape, in few words."""
    return (
        f"{model['architecture']}, {model['num_hidden_layers']} layers, hidden {model['hidden_size']}, "
        f"{model['num_attention_heads']}/{model['num_key_value_heads']} heads, vocabulary {model['vocab_size']}"
    )


def by_dtype(amounts: Mapping[str, int]) -> str:
    """Bytes of each dtype, for people."""
    return ", ".join(f"{dtype} {size(amount)}" for dtype, amount in amounts.items())


def plain(settings: Mapping[str, object]) -> str:
    """Settings as `key value` pairs."""
    return ", ".join(
        f"{key} {json.dumps(value) if not isinstance(value, str) else value}" for key, value in settings.items()
    )


def size(amount: float) -> str:
    """Bytes for people, in powers of 1000."""
    unit = 0
    while amount >= 1000 and unit < len(UNITS) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{amount:.0f} {UNITS[unit]}" if amount >= 100 or unit == 0 else f"{amount:.3g} {UNITS[unit]}"


def warnings(results: Results) -> list[str]:
    """Sentences about what the numbers do not show."""
    found = []
    emulated = [engine.name for engine in results.engines if engine.emulates_fp8]
    if emulated:
        found.append(
            f"FP8 arithmetic is emulated on this device ({', '.join(emulated)}): the weights are FP8 values, computed "
            "with in a wider type. Their accuracy is FP8's; their speed shows only on a GPU with FP8 arithmetic "
            "(NVIDIA Ada, Hopper or later)."
        )
    devices = sorted({str(engine.provenance["device"]) for engine in results.engines})
    if len(devices) > 1:
        found.append(f"The engines ran on different devices, so speed-ups compare those too: {'; '.join(devices)}.")
    workloads = {json.dumps(engine.manifest["settings"], sort_keys=True) for engine in results.engines}
    if len(workloads) > 1:
        found.append("The engines ran different workloads or prompts: their rows are not a fair comparison.")
    stopped = sum(row["cancelled"] for row in results.rows)
    if stopped:
        asked = sum(row["requests"] for row in results.rows)
        found.append(
            f"{stopped} of {asked} requests were stopped before their end, as the workload asks: latencies "
            "and accuracy are of those that finished first, which are the shorter answers."
        )
    few = min(engine.accuracy.scored if engine.accuracy else 0 for engine in results.engines)
    if few < FEW_ANSWERS:
        found.append(f"Accuracy rests on {few} answers an engine: too few to tell engines apart by it.")
    return found


def source_line(results: Results) -> str:
    """One line for the foot of a plot: device, versions, date, commit."""
    engine = results.engines[0]
    provenance, first = engine.provenance, engine.rows[0]
    commit = str(provenance["fourfold"]["commit"])
    short = commit[:10] + ("-dirty" if commit.endswith("-dirty") else "")
    return f"{provenance['device']} · torch {provenance['libraries']['torch']} · {first['date']} · fourfold {short}"
