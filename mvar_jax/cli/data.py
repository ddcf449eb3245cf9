"""Check the images of a config before training: counts, bad files, class balance, decoding rate, contact sheets."""

from pathlib import Path

from mvar_jax.cli.configuration import add_config_argument, read_config
from mvar_jax.errors import InputError
from mvar_jax.files.paths import as_path

SUMMARY = "check a data set and report what is in it"
MAX_BAD_SHOWN = 20


def add_arguments(parser) -> None:
    """--config FILE --out DIR [--num_pictures N]."""
    add_config_argument(parser)
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of data.json and of a contact sheet for each split"
    )
    parser.add_argument(
        "--num_pictures", type=int, default=64, metavar="N", help="images on a contact sheet (default 64)"
    )


def run(args) -> int:
    """Write data.json, train.png and val.png. Returns 1 if more images are bad than `data.max_bad_share` allows."""
    config = read_config(args.config, args.overrides)
    from mvar_jax import build

    out, data = as_path(args.out, "out"), build.build_data(config)
    if not 0 <= args.num_pictures <= 10_000:
        raise InputError(
            f"--num_pictures must be from 0 to 10000, got {args.num_pictures}",
            field="num_pictures",
            given=args.num_pictures,
            expected="0 to 10000",
        )
    transform, loading = data.transform(getattr(build.build_module(config), "channels", 3)), data.loading()
    sources = data.open_all()

    from mvar_jax.processes.holding import owned_folder

    with owned_folder("out", out, "data", None):  # a survey replaces any other
        return write_survey(sources, transform, loading, data, out, args.num_pictures)


def write_survey(sources: dict, transform, loading, data, out: Path, num_pictures: int) -> int:
    """Write and print what is in the sources; return the exit status."""
    from mvar_jax.data.survey import survey
    from mvar_jax.files.atomic import write_json
    from mvar_jax.files.images import save_png, tile_grid

    found, sheets, is_fine = {}, {}, True
    for split, source in sources.items():
        walk = survey(source, transform, split, num_pictures=num_pictures, num_threads=loading.num_threads)
        found[split] = walk.summary()
        if len(walk.pictures_NYX3):
            columns = max(1, round(len(walk.pictures_NYX3) ** 0.5))
            sheets[split] = tile_grid(walk.pictures_NYX3, columns)
        is_fine &= found[split]["num_bad"] <= loading.max_bad_share * found[split]["num_images"]
        print("\n  ".join([describe(split, found[split], out), *source.notes]))
    write_json(out / "data.json", {"data": data.describe(), **found})  # first: the folder is known by it
    for split, sheet in sheets.items():
        save_png(out / f"{split}.png", sheet)
    if not is_fine:
        print(f"too many bad images: training would stop; data.max_bad_share is {loading.max_bad_share}")
    return 0 if is_fine else 1


def describe(split: str, found: dict, out: Path) -> str:
    """Return the findings of one split in a few lines."""
    balance = lambda names: ", ".join(f"{name} {count}" for name, count in names.items())
    lines = [
        f"{split}: {found['num_images']} images, {found['num_bad']} bad; "
        f"{found['images_per_s']} images/s with {found['num_threads']} threads",
        f"  {found['num_classes']} classes, {found['num_empty_classes']} of them empty; a class has "
        f"{found['median_per_class']:.0f} images (median); fewest: {balance(found['fewest'])}; "
        f"most: {balance(found['most'])}",
    ]
    lines += [f"  bad: {bad['name']}: {bad['reason']}" for bad in found["bad"][:MAX_BAD_SHOWN]]
    if found["num_bad"] > MAX_BAD_SHOWN:
        lines.append(f"  and {found['num_bad'] - MAX_BAD_SHOWN} more: see {out / 'data.json'}")
    return "\n".join(lines)
