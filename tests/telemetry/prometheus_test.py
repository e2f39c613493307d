import dataclasses
import json
import re
import urllib.request

from absl.testing import absltest

from covenant import metrics
from covenant.telemetry import prometheus
from tests import helpers


def fetch(url):
  with urllib.request.urlopen(url, timeout=10) as answer:
    return answer.read().decode()


class EndpointTest(absltest.TestCase):
  def endpoint(self, address='0'):
    made = prometheus.Endpoint(address, {'role': 'miner', 'hotkey': '5F'})
    self.addCleanup(made.close)
    return made

  def test_is_on_the_loopback_and_shows_the_newest_values(self):
    endpoint = self.endpoint()
    self.assertStartsWith(endpoint.url, 'http://127.0.0.1:')
    endpoint.record('step', {'loss': 2.5, 'tokens': 100})
    endpoint.record('step', {'loss': 2.25, 'tokens': 100})
    endpoint.event('train', '')
    endpoint.event('commit', 'why')
    lines = fetch(endpoint.url).splitlines()
    self.assertContainsSubset(
      {
        'covenant_step_loss 2.25',
        'covenant_tokens_total 200.0',
        'covenant_node_info{hotkey="5F",role="miner"} 1.0',
        'covenant_events_total{outcome="done",what="train"} 1.0',
        'covenant_events_total{outcome="failed",what="commit"} 1.0',
      },
      set(lines),
    )

  def test_an_address_that_is_taken_is_named(self):
    port = self.endpoint().url.split(':')[-1].removesuffix('/metrics')
    with self.assertRaisesRegex(prometheus.EndpointError, f'{port} cannot be'):
      prometheus.Endpoint(f'127.0.0.1:{port}', {})

  def test_values_of_a_status(self):
    status = {
      'round': 3,
      'loss': 2.5,
      'phase': 'ready',
      'head': None,
      'x': True,
    }
    self.assertEqual(prometheus.values_of(status), {'round': 3.0, 'loss': 2.5})


class DashboardTest(absltest.TestCase):
  def test_shows_only_what_the_endpoint_has(self):
    text = (helpers.ROOT / 'docs' / 'grafana.json').read_text()
    shown = {
      name
      for panel in json.loads(text)['panels']
      for target in panel['targets']
      for name in re.findall(r'covenant_\w+', target['expr'])
    }
    known = {'covenant_tokens_total', 'covenant_events_total'}
    known |= {f'covenant_status_{name}' for name in ('round', 'loss', 'head')}
    for kind in (metrics.Step, metrics.NodeRound):
      known |= {
        f'covenant_{kind.kind}_{field.name}'
        for field in dataclasses.fields(kind)
      }
    self.assertContainsSubset(shown, known)
    self.assertGreater(len(shown), 20)


if __name__ == '__main__':
  absltest.main()
