"""The faults of tools/faults/ can still be planted, and a planted one is noticed."""

import pytest

from tools.plant import ROOMS, ROOT, faults_of, main


@pytest.mark.parametrize("room", ROOMS)
def test_every_fault_still_has_its_place(room: str):
    found = faults_of(room)
    assert len({fault.name for fault in found}) == len(found) > 30
    for fault in found:
        assert fault.old in (ROOT / fault.file).read_text(), f"{fault.name}: {fault.file} has changed; change `old`"
        assert fault.old != fault.new
        for test in fault.tests:
            assert (ROOT / test.split("::")[0]).exists(), f"{fault.name}: {test} is not there"


@pytest.mark.slow
def test_a_fault_is_planted_noticed_and_taken_out(capsys: pytest.CaptureFixture[str]):
    assert main(["diffusion", "--only", "no-gamma"]) == 0
    assert "diffusion: 1 of 1 faults noticed" in capsys.readouterr().out
