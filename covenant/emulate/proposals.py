"""Amendments that an operator proposes: to a network, or to an emulated run.

In a network the operator of a validator signs one and puts it into the bucket
of the validator (covenant/node/amend.py). All validators of an emulated run
support what is in proposals.jsonl of its folder.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Sequence

from covenant import config as config_lib
from covenant import files
from covenant.config import amend as fields
from covenant.emulate import host as host_lib
from covenant.node import amend
from covenant.node import connect
from covenant.node import extension
from covenant.node import validator_role as role_lib
from covenant.node import workdir as workdir_lib
from covenant.protocol import amendments as amendments_lib
from covenant.protocol import history as history_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import published_rules
from covenant.protocol import rollback
from covenant.train import shared_state as shared_state_lib
from covenant.wire import amendment as amendment_lib
from covenant.wire import manifest as manifest_lib

_FILE = 'proposals.jsonl'
_LATER = '0' * 32  # the fingerprint of a state, until the run tells it


def run(
  config: config_lib.Config,
  workdir: str | os.PathLike[str],
  round_index: int | None,
  edits: Sequence[str],
  withdraw: bool = False,
) -> str:
  """Proposes an amendment, or withdraws one; returns lines for people.

  Args:
    config: of the run, with the `network` section of a validator.
    workdir: of an emulated run, which may not have begun; empty: not given. Of
      a network it is not looked at.
    round_index: the first round with the new values; None only lists.
    edits: texts `path=value`.
    withdraw: True: the support of the amendments from this round is removed.

  Raises:
    ConfigError, AmendmentError: the amendment is not allowed, or its run is not
      named.
    ChainError, StoreError: the network cannot be reached.
  """
  folder, network = pathlib.Path(workdir), config.network
  if network.chain == 'local' and not network.path:
    if not workdir:
      raise config_lib.ConfigError(
        '--workdir: expected the folder of an emulated run; of a network give '
        '--config.network.path, or another --config.network.chain'
      )
    held = workdir_lib.Workdir(folder).held() or config
    return _emulated(held, folder, round_index, edits, withdraw)
  return _network(config, round_index, edits, withdraw)


def _emulated(
  config: config_lib.Config,
  folder: pathlib.Path,
  round_index: int | None,
  edits: Sequence[str],
  withdraw: bool,
) -> str:
  run = shared_state_lib.SharedModel(config).run
  proposed = read(folder, run)
  if round_index is None:
    records = files.read_records(folder / workdir_lib.AMENDMENTS, 'digest')
    lines = map(amendments_lib.describe, records.objects)
    return '\n'.join(lines) or 'no amendment is adopted'
  if withdraw:
    left = [one for one in proposed if one.round != round_index]
  else:
    values = fields.parse(edits)
    if fields.RESTORE in values:
      values[fields.RESTORE] = [values[fields.RESTORE], _LATER]
    amendment = amendment_lib.make(run, round_index, values)
    first = max(round_index - manifest_lib.NOTICE, 0)
    amendments_lib.check(config, proposed, amendment, first)
    amend.refuse_twice(proposed, amendment)
    left = [*proposed, amendment]
  lines = [json.dumps(amendment_lib.to_json(one)) for one in left]
  folder.mkdir(parents=True, exist_ok=True)
  files.write_lines(folder / _FILE, lines)
  if withdraw:
    return f'{len(proposed) - len(left)} withdrawn'
  return '\n'.join(
    [
      _text(config, proposed, left[-1]),
      'the validators of the run support it as soon as it runs',
    ]
  )


def read(folder: pathlib.Path, run: bytes) -> list[amendment_lib.Amendment]:
  """Returns the amendments that are proposed to an emulated run.

  Raises:
    AmendmentError: the file is not one that `run` wrote.
  """
  found = []
  for raw in files.read_records(folder / _FILE, 'run', 'changes').objects:
    try:
      amendment = amendment_lib.from_json(raw)
    except (ValueError, TypeError, KeyError) as e:
      raise amendment_lib.AmendmentError(f'{folder / _FILE}: {e}') from None
    if amendment.run != run:
      raise amendment_lib.AmendmentError(f'{folder / _FILE}: of another run')
    found.append(amendment)
  return found


def support(host: host_lib.Host, folder: pathlib.Path) -> None:
  """Lets all validators of an emulated run support what is proposed to it."""
  run = host.shared_model.run
  wanted = [
    amendment
    for amendment in _with_states(read(folder, run), host.validators[0])
    if amendment not in host.validators[0].amendments
  ]
  for node in host.validators:
    key, chain = node.chain.hotkey, node.chain
    own = amend.own_supports(node.objects, run, key, chain.verify)
    for amendment in wanted:
      if amendment not in own:
        amend.support(
          node.objects, run, amendment, key, chain.sign, chain.verify,
          node.state.round,
        )  # fmt: skip


def _with_states(
  proposed: Sequence[amendment_lib.Amendment], node: role_lib.Validator
) -> Iterator[amendment_lib.Amendment]:
  """Yields amendments, rollbacks with the fingerprints that a validator has."""
  for amendment in proposed:
    target = amendments_lib.restored(amendment)
    if target is None:
      yield amendment
    elif known := node.role.prints.get(target.round):
      values = amendment.values | {fields.RESTORE: [target.round, known]}
      yield amendment_lib.make(amendment.run, amendment.round, values)


def _network(
  config: config_lib.Config,
  round_index: int | None,
  edits: Sequence[str],
  withdraw: bool,
) -> str:
  shared_model = shared_state_lib.SharedModel(config)
  chain, run = connect.chain(config), shared_model.run
  head = chain.head()
  adopted = published_rules.read(
    chain,
    connect.objects(config, run, writes=False),
    shared_model,
    head,
    (),
  )
  schedule = amendments_lib.schedule(config, adopted)
  membership = membership_lib.read(chain, max(head, 0), schedule)
  objects = connect.objects(config, run, writes=round_index is not None)
  if round_index is None:
    return _listed(config, adopted, objects, membership, run, chain.verify)
  # The manifest of the round under way is the next one that can adopt it.
  now = max(schedule.round_at(head), 0)
  if withdraw:
    count = amend.withdraw(
      objects, run, chain.hotkey, chain.verify, round_index
    )
    return f'{count} withdrawn'
  values = fields.parse(edits)
  if fields.RESTORE in values:
    sources = rollback.sources(objects, membership)
    around = rollback.Surroundings(chain, objects, shared_model, sources)
    view = history_lib.view(
      chain, objects, schedule, run, head,
      amendments_lib.last_config(config, adopted).rounds,
      lambda r: amendments_lib.model(shared_model, adopted, r).most_entries,
    )  # fmt: skip
    values[fields.RESTORE] = _state(around, view, values[fields.RESTORE])
  amendment = amendment_lib.make(run, round_index, values)
  amendments_lib.check(config, adopted, amendment, now)
  amend.support(
    objects, run, amendment, chain.hotkey, chain.sign, chain.verify, now
  )
  lines = [_text(config, adopted, amendment)]
  peer = membership.peers[membership.uid(chain.hotkey)]
  if not peer.permit:
    lines.append(
      f'{chain.hotkey} has no permit of a validator: its support counts '
      'nothing until it has one'
    )
  total = sum(membership.stakes(max(membership.round, 0)).values())
  lines.append(
    f'supported by {chain.hotkey} with a stake of {peer.stake:,.1f}; more than '
    f'{total / 2:,.1f} is needed, by the manifest of round '
    f'{round_index - manifest_lib.NOTICE}'
  )
  return '\n'.join(lines)


def _state(
  around: rollback.Surroundings, view: history_lib.View, round_index: int
) -> list[int | str]:
  """Returns the published state before a round, as a rollback names it.

  Its fingerprint is that of the history, whatever anybody publishes.
  """
  model = around.shared_model
  if round_index == model.genesis.first_round:  # needs no checkpoint
    return [round_index, model.fingerprint(model.init())]
  target = rollback.proven(around, view, round_index)
  if target is None:
    listed = around.storage.rounds_of_each(
      'checkpoints', [source.bucket for source in around.sources]
    )
    there = sorted(
      {r for rounds in listed if isinstance(rounds, list) for r in rounds}
    )
    raise config_lib.ConfigError(
      f'restore: no validator has a checkpoint of round {round_index} that a '
      f'later manifest vouches for; expected one of {there}'
    )
  return [target.round, target.fingerprint]


def _listed(config, adopted, objects, membership, run, verify) -> str:
  """Returns what is adopted, and what validators support."""
  lines = []
  for i, one in enumerate(adopted):
    record = amendments_lib.record(config, adopted[:i], one, 0)
    lines.append(f'adopted: {amendments_lib.describe(record)}')
  stakes = membership.stakes(max(membership.round, 0))
  behind: dict[amendment_lib.Amendment, float] = {}
  for peer in membership.candidates:
    for one in amend.supports_of(objects, membership, peer, run, verify):
      behind[one] = behind.get(one, 0.0) + stakes.get(peer.uid, 0.0)
  total = sum(stakes.values()) or 1.0
  for one, stake in behind.items():
    if one not in adopted:
      record = amendments_lib.record(config, adopted, one, 0)
      lines.append(
        f'supported by {stake / total:.0%} of the stake: '
        f'{amendments_lib.describe(record)}'
      )
  return '\n'.join(lines) or 'no amendment is adopted or supported'


def _text(
  config: config_lib.Config,
  adopted: Sequence[amendment_lib.Amendment],
  amendment: amendment_lib.Amendment,
) -> str:
  record = amendments_lib.record(config, adopted, amendment, 0)
  before = amendments_lib.before(config, adopted, amendment.round)
  lines = [amendments_lib.describe(record)]
  if not record['needed']:
    after = fields.amended(before, amendment.round, amendment.values)
    if note := extension.describe(before, after, amendment.round):
      lines.append(note)
  return '\n'.join(lines)
