import sys; sys.path.insert(0, "/tmp/wt/any/tests")
from test_teachers import *
import dataclasses
@pytest.mark.parametrize("inheritance", ["auto", "manual"])
@pytest.mark.parametrize("name", OF_OTHER_KINDS)
def test_other(name, inheritance, folder_of, job, tmp_path):
    teacher = folder_of(name, OF_OTHER_KINDS[name])
    opened = job(teacher, inheritance=inheritance, gate_kinds="hidden,heads,neurons", losses="affinity_mimicking=1")
    train(opened)
    assert Run(tmp_path / "run").status()["state"] != "failed"
    s = load_model(tmp_path / "run" / "stage-1" / "student", "cpu")
    full = load_model(teacher,"cpu")
    print({t:(x.width,x.heads,x.neurons,x.layout) for t,x in s.shapes.items()})
    assert count_cost(s).parameters < count_cost(full).parameters
    assert shape_cost(s.config["model_cfg"], s.shapes) == count_cost(s) or inheritance=="manual"
