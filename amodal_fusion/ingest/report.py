"""The report of `create`: a summary on the screen, a row per completion in report.csv, a figure."""

from collections import Counter

from amodal_fusion.data.dataset_folder import append_rows
from amodal_fusion.data.images import read_image
from amodal_fusion.data.names import printable
from amodal_fusion.files import plain_cell

COMPLETION_COLUMNS = ("file", "kept_as", "reason", "hole_share", "new_share", "visible_error", "background")
REPORT_COLUMNS = ("scene", "hole", "hole_of_picture", *COMPLETION_COLUMNS, "layout")
SHOWN_FOLDERS = 3  # per layout
SHOWN_ALIKE = 10  # equal messages of several scenes


def append_report(path, raw, report):
    """Append a row per completion of a finished scene; an interrupted run keeps its rows."""
    rows = []
    for row in report["completions"]:
        values = (f"{v:.3f}" if isinstance(v, float) else v for v in (row[column] for column in COMPLETION_COLUMNS))
        rows.append([plain_cell(printable(value)) if isinstance(value, str) else value for value in (
            raw.id, report["hole"], f"{report['hole_share']:.3f}", *values, raw.layout)])
    append_rows(path, REPORT_COLUMNS, rows)


def counts(values):
    """"4 black, 1 white": the most frequent first."""
    return ", ".join(f"{count} {value}" for value, count in Counter(values).most_common())


def plural(number, noun):
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def layout_lines(raw_scenes, reports, skipped, input_dir):
    """A line per layout: where it was found, and the results."""
    by_layout = {}
    for raw in raw_scenes:
        by_layout.setdefault(raw.layout, []).append(raw)
    lines = []
    for layout, scenes in sorted(by_layout.items()):
        tops = sorted({raw.folder.relative_to(input_dir).parts[:1] for raw in scenes})
        where = ", ".join(part[0] if part else "." for part in tops[:SHOWN_FOLDERS])
        more = f" and {len(tops) - SHOWN_FOLDERS} more" if len(tops) > SHOWN_FOLDERS else ""
        done = [reports[raw.id] for raw in scenes if raw.id in reports]
        line = f"layout {layout}: {plural(len(scenes), 'scene')} in {where}{more}"
        if done:
            rows = [row for report in done for row in report["completions"]]
            kept = sum(row["kept_as"] is not None for row in rows)
            targets = sum(report["trainable"] for report in done)
            line += (f"; hole: {counts(report['hole'] for report in done)}; completions: {len(rows)} found, {kept} "
                     f"kept; {targets} with an original")
        bad = sum(raw.id in skipped for raw in scenes)
        line += f"; {bad} bad" if bad else ""
        lines.append(printable(line))
    return lines


def print_report(raw_scenes, reports, skipped, input_dir, targetless_list):
    """Print what was found, kept and dropped, and the faults of every bad scene."""
    rows = [row for report in reports.values() for row in report["completions"]]
    for line in layout_lines(raw_scenes, reports, skipped, input_dir):
        print(line)
    print(f"written {len(reports)}, bad {len(skipped)}")
    if reports:
        print(f"hole: {counts(report['hole'] for report in reports.values())}")
        print(f"background of completions: {counts(row['background'] for row in rows)}")
        reasons = [row["reason"].split(" of number")[0] for row in rows if row["kept_as"] is None]
        print(f"completions: {len(rows)} found, {len(rows) - len(reasons)} kept; dropped: {counts(reasons) or 'none'}")
        targetless = sum(not report["trainable"] for report in reports.values())
        if targetless:
            print(f"{targetless} scenes have no original: for inference only, listed in {targetless_list}")
        print_alike("note", [(scene_id, printable(note)) for scene_id, report in sorted(reports.items())
                              for note in report["notes"]], {}, "")
    folders = {raw.id: printable(raw.folder) for raw in raw_scenes}
    print_alike("bad", sorted(skipped.items()), folders, ", all in skipped.csv")


def print_alike(kind, messages, folders, where):
    """Print [(scene id, message)]; of messages that differ only in the scene, SHOWN_ALIKE."""
    alike = Counter()
    for scene_id, message in messages:
        text = message.replace(folders.get(scene_id, scene_id), "").replace(scene_id, "")
        alike[text] += 1
        if alike[text] <= SHOWN_ALIKE:
            print(f"{kind}: {scene_id}: " + message.replace("\n", "\n     "))
    for text, count in alike.items():
        if count > SHOWN_ALIKE:
            print(f"{kind}: {count - SHOWN_ALIKE} more scenes{where}: " + " ".join(text.split()).lstrip(": "))


def examples_of_layouts(raw_scenes, number):
    """`number` scenes for the figure, of as many layouts as possible."""
    rank, seen = {}, Counter()
    for raw in raw_scenes:
        rank[raw.id] = seen[raw.layout]
        seen[raw.layout] += 1
    return sorted(raw_scenes, key=lambda raw: rank[raw.id])[:number]


def selection_panels(raw, report, folder):
    """(title, RGB or RGBA picture, kept or None) of a raw scene and of its prepared scene in `folder`."""
    panels = [(printable(f"{raw.id}\n{raw.layout}"), read_image(folder / "partial.png", "RGB"), None)]
    if raw.original:
        panels.append(("original", read_image(raw.original, "RGB"), None))
    rows = sorted(zip(report["completions"], raw.completions), key=lambda pair: pair[0]["kept_as"] or 1000)
    for row, completion in rows:
        written = folder / f"comp{row['kept_as']}.png" if row["kept_as"] else completion.path
        picture = read_image(written, "RGBA")
        name = printable(row["file"])
        name += f"\nkept as comp{row['kept_as']}" if row["kept_as"] else f"\n{row['reason']}"
        panels.append((name, picture, row["kept_as"] is not None))
    return panels
