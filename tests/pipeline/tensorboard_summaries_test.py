"""TensorBoard summaries of sample and credit, read back and compared with the records."""

import struct
from unittest import mock

import pytest
from absl.testing import absltest
from tensorboard.backend.event_processing import event_accumulator

from synthneg_jax.data.records import Shards, StepEstimate, Trace
from synthneg_jax.pipeline import tensorboard_summaries
from synthneg_jax.runtime import event_files
from tests.pipeline import small_run

pytestmark = pytest.mark.slow  # trains


def board(stage: str):
  opened = event_accumulator.EventAccumulator(
    str(small_run.finished() / stage), {"images": 0, "tensors": 0}
  )
  opened.Reload()
  return opened


class BoardsTest(absltest.TestCase):
  def test_traces(self):
    # Fails if no trace is shown, if its text can contain markup, or if lengths belong to other
    # traces.
    shown, experiment = board("sample"), small_run.opened(small_run.finished())
    texts = [name for name in shown.Tags()["tensors"] if name.startswith("traces/")]
    self.assertLen(texts, experiment.config.report.num_traces)
    traces = Shards(experiment.workdir / "sample" / "traces", Trace).read_dict()
    for name in texts:
      text = shown.Tensors(name)[0].tensor_proto.string_val[0].decode()
      trace = traces[text.partition(":")[0]]
      self.assertIn(f"**{trace.reason}**", text)
      self.assertIn("".join(f"    {line}\n" for line in trace.text.split("\n")), text)
    lengths = shown.Histograms("traces/tokens")[0].histogram_value
    self.assertEqual(lengths.num, len(traces))
    self.assertBetween(max(len(trace.ids) for trace in traces.values()), lengths.min, lengths.max)

  def test_step_values(self):
    # Fails if a text has no image, if an image is invalid, or if the histogram counts steps without
    # Q.
    shown, experiment = board("credit"), small_run.opened(small_run.finished())
    drawings = shown.Tags()["images"]
    self.assertNotEmpty(drawings)
    self.assertLessEqual(len(drawings), experiment.config.report.num_traces)
    for name in drawings:
      image = shown.Images(name)[0]
      self.assertEqual(
        struct.unpack(">II", image.encoded_image_string[16:24]), (image.width, image.height)
      )
      self.assertIn(f"{name}/text_summary", shown.Tags()["tensors"])
    estimates = list(Shards(experiment.workdir / "credit" / "estimates", StepEstimate).read())
    counted = shown.Histograms("q/per_step")[0].histogram_value
    self.assertBetween(counted.num, 1, len(estimates))
    self.assertBetween(counted.max, 0.0, 1.06)

  def test_a_histogram_counts_between_its_edges(self):
    # Fails if a count moves to another bucket: 2 below 0, none from 0 to 1, 3 from 1 to 3, 1 above.
    histogram = event_files._bucketed([0.0, 1.0, 3.0], [2, 0, 3, 1])
    self.assertEqual(list(histogram.bucket_limit), [0.0, 1.0, 3.0, 5.0])
    self.assertEqual(list(histogram.bucket), [2, 0, 3, 1])
    self.assertEqual((histogram.min, histogram.max, histogram.num), (-1.0, 5.0, 6.0))
    self.assertEqual((histogram.sum, histogram.sum_squares), (9.0, 28.5))  # midpoints -.5, .5, 2, 4
    inner = event_files._bucketed([0.0, 1.0, 3.0], [0, 4, 0, 0])
    self.assertEqual(
      (inner.min, inner.max, list(inner.bucket_limit), list(inner.bucket)), (0.0, 1.0, [1.0], [4.0])
    )

  def test_not_asked_for(self):
    # Fails if metrics.tensorboard=False still writes an event file.
    folder = small_run.copied("synthesize")
    experiment = small_run.opened(folder, **{"metrics.tensorboard": False})
    tensorboard_summaries.sampled(experiment, experiment.workdir / "sample", {}, [])
    self.assertFalse((folder / "sample").exists())
    with_wrong = mock.Mock(wrong=["a wrong trace"])
    tensorboard_summaries.credited(experiment, experiment.workdir / "credit", {}, with_wrong)
    self.assertFalse((folder / "credit").exists())


if __name__ == "__main__":
  absltest.main()
