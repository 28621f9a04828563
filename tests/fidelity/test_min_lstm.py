from minGRU_pytorch.minLSTM import minLSTM

from tests.fidelity.test_min_gru import measured

# One pass alone: continued from a state, their parallel form applies g to it again.


def test_min_lstm_equals_that_of_min_gru_pytorch(fidelity):
    gates = ["forget_gate", "input_gate"]
    found = [measured("min_lstm", minLSTM, gates, a) for a in (1.0, 1.5)]
    fidelity.record(
        "min_lstm",
        "minGRU-pytorch minLSTM, as wide as its input and wider",
        forward=max(forward for forward, _ in found),
        gradient=max(gradient for _, gradient in found),
    )
