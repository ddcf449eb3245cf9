import json

import numpy as np
from eight_devices import run_on_eight_devices


def test_a_refiner_trains_and_draws_the_same_on_a_mesh_as_on_one_device():
    """Its weights, those of its transformer and the batch are split; the refined samples are guided and filtered."""
    report = json.loads(run_on_eight_devices("refiner_mesh_case.py"))
    one, mesh = report["one"], report["mesh"]
    np.testing.assert_allclose(mesh["losses"], one["losses"], rtol=1e-5)
    assert one["losses"][-1] < one["losses"][0]
    assert mesh["ids"] == one["ids"] and np.unique(one["ids"]).size > 10
    assert one["shard_shapes"] == [[40, 160], [8, 45]] and mesh["shard_shapes"] == [[20, 80], [2, 45]]
