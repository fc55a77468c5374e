"""The report of `create`: a summary on the screen, a row per completion in report.csv, a figure."""

import csv
import re
from collections import Counter
from dataclasses import dataclass, field

from amodal_fusion.data.dataset_folder import append_rows
from amodal_fusion.data.images import read_image
from amodal_fusion.data.names import printable
from amodal_fusion.files import plain_cell

COMPLETION_COLUMNS = ("file", "kept_as", "reason", "hole_share", "new_share", "visible_error", "background")
REPORT_COLUMNS = ("scene", "hole", "hole_of_picture", *COMPLETION_COLUMNS, "layout")
SHOWN_FOLDERS = 3  # per layout
SHOWN_ALIKE = 10  # equal messages of several scenes


@dataclass
class Summary:
    """Counts over the scenes that a run wrote; "" stands for all layouts."""

    written: Counter = field(default_factory=Counter)  # layout → scenes
    targets: Counter = field(default_factory=Counter)  # layout → scenes with an original
    found: Counter = field(default_factory=Counter)  # layout → completions
    kept: Counter = field(default_factory=Counter)  # layout → completions
    holes: dict = field(default_factory=dict)  # layout → Counter of how the hole was found
    backgrounds: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)  # why completions were dropped
    notes: list = field(default_factory=list)  # of (scene id, note)

    def add(self, raw, report):
        rows = report["completions"]
        for layout in ("", raw.layout):
            self.written[layout] += 1
            self.targets[layout] += report["trainable"]
            self.found[layout] += len(rows)
            self.kept[layout] += sum(row["kept_as"] is not None for row in rows)
            self.holes.setdefault(layout, Counter())[report["hole"]] += 1
        self.backgrounds.update(row["background"] for row in rows)
        self.reasons.update(row["reason"].split(" of number")[0] for row in rows if row["kept_as"] is None)
        self.notes += [(raw.id, printable(note)) for note in report["notes"]]


def append_report(path, raw, report):
    """Append a row per completion of a finished scene; an interrupted run keeps its rows."""
    rows = []
    for row in report["completions"]:
        values = (f"{v:.3f}" if isinstance(v, float) else v for v in (row[column] for column in COMPLETION_COLUMNS))
        rows.append([plain_cell(printable(value)) if isinstance(value, str) else value for value in (
            raw.id, report["hole"], f"{report['hole_share']:.3f}", *values, raw.layout)])
    append_rows(path, REPORT_COLUMNS, rows)


def counts(counter):
    """"4 black, 1 white": the most frequent first."""
    return ", ".join(f"{count} {value}" for value, count in counter.most_common())


def plural(number, noun):
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def layout_lines(raw_scenes, summary, skipped, input_dir):
    """A line per layout: where it was found, and the results."""
    by_layout = {}
    for raw in raw_scenes:
        by_layout.setdefault(raw.layout, []).append(raw)
    lines = []
    for layout, scenes in sorted(by_layout.items()):
        tops = sorted({raw.folder.relative_to(input_dir).parts[:1] for raw in scenes})
        where = ", ".join(part[0] if part else "." for part in tops[:SHOWN_FOLDERS])
        more = f" and {len(tops) - SHOWN_FOLDERS} more" if len(tops) > SHOWN_FOLDERS else ""
        line = f"layout {layout}: {plural(len(scenes), 'scene')} in {where}{more}"
        if summary.written[layout]:
            line += (f"; hole: {counts(summary.holes[layout])}; completions: {summary.found[layout]} found, "
                     f"{summary.kept[layout]} kept; {summary.targets[layout]} with an original")
        bad = sum(raw.id in skipped for raw in scenes)
        line += f"; {bad} bad" if bad else ""
        lines.append(printable(line))
    return lines


def print_report(raw_scenes, summary, skipped, input_dir, targetless_list):
    """Print what was found, kept and dropped, and the faults of every bad scene."""
    for line in layout_lines(raw_scenes, summary, skipped, input_dir):
        print(line)
    written = summary.written[""]
    print(f"written {written}, bad {len(skipped)}")
    if written:
        print(f"hole: {counts(summary.holes[''])}")
        print(f"background of completions: {counts(summary.backgrounds)}")
        print(f"completions: {summary.found['']} found, {summary.kept['']} kept; dropped: "
              f"{counts(summary.reasons) or 'none'}")
        targetless = written - summary.targets[""]
        if targetless:
            print(f"{targetless} scenes have no original: for inference only, listed in {targetless_list}")
        print_alike("note", sorted(summary.notes, key=lambda note: note[0]), {}, "")
    folders = {raw.id: printable(raw.folder) for raw in raw_scenes}
    print_alike("bad", sorted(skipped.items()), folders, ", all in skipped.csv")


def print_alike(kind, messages, folders, where):
    """Print [(scene id, message)]; of messages that differ only in the scene, SHOWN_ALIKE."""
    alike = Counter()
    for scene_id, message in messages:
        text = message.replace(folders.get(scene_id, scene_id), "").replace(scene_id, "")
        alike[text] += 1
        if alike[text] <= SHOWN_ALIKE:
            folder = re.escape(folders.get(scene_id, scene_id))  # names the scene again
            shown = re.sub(rf"^{folder}(/|: )", "", message, flags=re.MULTILINE)
            print(f"{kind}: {scene_id}: " + shown.replace("\n", "\n     "))
    for text, count in alike.items():
        if count > SHOWN_ALIKE:
            print(f"{kind}: {count - SHOWN_ALIKE} more scenes{where}: " + " ".join(text.split()).lstrip(": "))


def examples_of_layouts(report, number):
    """`number` scenes for the figure, of as many layouts as possible: [(scene id, rows)] from the table `report`."""
    examples = {}  # layout → its first scenes
    with open(report, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            scenes = examples.setdefault(row["layout"], {})
            if row["scene"] in scenes or len(scenes) < number:
                scenes.setdefault(row["scene"], []).append(row)
    ranked = sorted((rank, scene_id, rows) for scenes in examples.values()
                    for rank, (scene_id, rows) in enumerate(scenes.items()))
    return [(scene_id, rows) for _, scene_id, rows in ranked[:number]]


def selection_panels(raw, rows, folder):
    """(title, RGB or RGBA picture, kept or None) of a raw scene and of its prepared scene in `folder`.

    Args:
        rows: of the report's table, one per completion.
    """
    panels = [(printable(f"{raw.id}\n{raw.layout}"), read_image(folder / "partial.png", "RGB"), None)]
    if raw.original:
        panels.append(("original", read_image(raw.original, "RGB"), None))
    for row, completion in sorted(zip(rows, raw.completions), key=lambda pair: int(pair[0]["kept_as"] or 1000)):
        written = folder / f"comp{row['kept_as']}.png" if row["kept_as"] else completion.path
        picture = read_image(written, "RGBA")
        name = f"{row['file']}\nkept as comp{row['kept_as']}" if row["kept_as"] else f"{row['file']}\n{row['reason']}"
        panels.append((name, picture, bool(row["kept_as"])))
    return panels
