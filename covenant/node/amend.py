"""A validator's part in amendments: it supports, proposes and checks them.

The operator of a validator puts its signed support into the bucket of the
validator (`--role=amend`). Validators read each other's supports after every
round. As soon as more than half of the stake supports an amendment, the leader
puts it into its manifest with the signatures, and the others vote for no
manifest without it that comes a round later.
"""

from collections.abc import Iterable

from covenant import typing as ct
from covenant.chain import interface as chain_lib
from covenant.config import amend as fields
from covenant.node import follow
from covenant.node import targets
from covenant.node import validator_role as role_lib
from covenant.protocol import amendments as amendments_lib
from covenant.protocol import membership as membership_lib
from covenant.protocol import published_rules
from covenant.protocol import rollback
from covenant.protocol import run_storage as run_storage_lib
from covenant.store import interface as store_lib
from covenant.wire import amendment as amendment_lib
from covenant.wire import commitment as commitment_lib
from covenant.wire import manifest as manifest_lib

AmendmentError = amendment_lib.AmendmentError
Membership = membership_lib.Membership
Validator = role_lib.Validator

_KIND = 'amendments'


def support(
  objects: run_storage_lib.RunStorage,
  run: bytes,
  amendment: amendment_lib.Amendment,
  hotkey: str,
  sign: ct.Sign,
  verify: amendment_lib.Verify,
  oldest: int = 0,
) -> None:
  """Adds an amendment to those that a validator supports, in its own bucket.

  Args:
    objects: with the bucket of the validator.
    run: the id of the run.
    amendment: the amendment.
    hotkey: of the validator.
    sign: signs bytes as this hotkey.
    verify: returns whether a hotkey signed bytes.
    oldest: amendments of earlier rounds are left out from now on.

  Raises:
    AmendmentError: it supports too many, or one for this round already.
    StoreError: the bucket cannot be read or written.
  """
  own = own_supports(objects, run, hotkey, verify)
  own = {a: s for a, s in own.items() if a.round >= oldest}
  refuse_twice(own, amendment)
  own[amendment] = amendment_lib.sign(amendment, hotkey, sign).signature
  if len(own) > amendment_lib.MAX_SUPPORTS:
    raise AmendmentError(
      f'expected at most {amendment_lib.MAX_SUPPORTS} amendments that are not '
      'adopted yet; withdraw one with --withdraw'
    )
  put(objects, own)


def refuse_twice(
  known: Iterable[amendment_lib.Amendment], amendment: amendment_lib.Amendment
) -> None:
  """Raises AmendmentError if another one sets a field from the same round on.

  Both could be adopted, and only the later of them would have an effect.
  """
  for one in known:
    paths = sorted(one.values.keys() & amendment.values.keys())
    if one != amendment and one.round == amendment.round and paths:
      raise AmendmentError(
        f'an amendment of {paths[0]} from round {one.round} on is supported '
        'already; withdraw it first with --withdraw'
      )


def withdraw(
  objects: run_storage_lib.RunStorage,
  run: bytes,
  hotkey: str,
  verify: amendment_lib.Verify,
  round_index: int,
) -> int:
  """Removes the own supports of amendments from a round; returns how many.

  A damaged list of supports is replaced by an empty one. A validator that has
  read the signature may put it into a manifest until the round is too near.
  """
  try:
    own = own_supports(objects, run, hotkey, verify)
  except AmendmentError:
    own = {}
  left = {a: s for a, s in own.items() if a.round != round_index}
  put(objects, left)
  return len(own) - len(left)


def own_supports(
  objects: run_storage_lib.RunStorage,
  run: bytes,
  hotkey: str,
  verify: amendment_lib.Verify,
) -> dict[amendment_lib.Amendment, bytes]:
  """Returns what a validator supports, from its own bucket."""
  limit = amendment_lib.MAX_SUPPORT_BYTES
  try:
    data = objects.bucket.get(objects.key(_KIND, 0), limit)
  except store_lib.MissingObjectError:
    return {}
  return amendment_lib.decode_supports(data, run, hotkey, verify)


def put(
  objects: run_storage_lib.RunStorage,
  supported: dict[amendment_lib.Amendment, bytes],
) -> None:
  """Puts what a validator supports into its own bucket."""
  data = amendment_lib.encode_supports(supported)
  objects.bucket.put(objects.key(_KIND, 0), data, replace=True)


def keep(node: Validator, head: int) -> None:
  """Reads what validators support, and publishes what the run has adopted.

  Raises:
    StoreError, ChainError: tried again at the next block.
  """
  role, run = node.role, node.shared_model.run
  if len(node.amendments) != role.published_rules:
    data = amendment_lib.encode_adopted(node.amendments, run, node.chain.sign)
    published_rules.publish(node.objects, data)
    role.published_rules = len(node.amendments)
  block = max(node.schedule.finalized(head), 0)
  membership = membership_lib.read(node.chain, block, node.schedule)
  role.supports = _read(node, membership, head)
  r = node.state.round
  role.supported = {
    amendment: role.supported.get(amendment, r)
    for amendment, signatures in role.supports.items()
    if membership.is_majority([*signatures], max(r - 1, 0))
  }
  coming = [a for a in node.amendments if a.round > r]
  targets.keep(node, membership, [*coming, *wanted(node)], head)


def _read(
  node: Validator, membership: Membership, head: int
) -> dict[amendment_lib.Amendment, dict[str, bytes]]:
  """Returns the signatures under each amendment that may still be adopted.

  Those with a malformed `restore` may not: no release adopts them.
  """
  role, found = commitment_lib.Role.VALIDATOR, {}
  opened = [
    (peer, bucket)
    for peer in membership.candidates
    if membership.role(peer.uid) is role
    and (location := membership.location(peer.uid))
    and not node.objects.failed(location)
    and (bucket := node.objects.bucket_at(location)) is not None
  ]
  got = node.objects.fetch_each(
    node.objects.key(_KIND, 0),
    [bucket for _, bucket in opened],
    amendment_lib.MAX_SUPPORT_BYTES,
    follow.patience(node, head, head + 2),
  )
  first = node.state.round + manifest_lib.NOTICE
  for (peer, _), data in zip(opened, got, strict=True):
    if isinstance(data, store_lib.StoreError):
      continue
    try:
      supported = amendment_lib.decode_supports(
        data, node.shared_model.run, peer.hotkey, node.chain.verify
      )
    except AmendmentError:
      continue
    for amendment, signature in supported.items():
      if amendment.round < first or amendment in node.amendments:
        continue
      if fields.RESTORE not in amendment.values or rollback.target(amendment):
        found.setdefault(amendment, {})[peer.hotkey] = signature
  return found


def wanted(node: Validator) -> list[amendment_lib.Amendment]:
  """Returns the amendments that a validator supports, or a majority does."""
  role, own = node.role, node.chain.hotkey
  mine = [a for a, signed in role.supports.items() if own in signed]
  return [*mine, *role.supported]


def due(
  node: Validator, closing: Membership, round_index: int
) -> amendment_lib.Adoption | None:
  """Returns the amendment that a manifest of this validator adopts, if any.

  It is the one of the earliest round, and then of the smallest digest.
  """
  supports = node.role.supports
  for amendment in sorted(supports, key=lambda a: (a.round, a.digest)):
    signatures = supports[amendment]
    if not closing.is_majority([*signatures], round_index):
      continue
    try:
      _check(node, amendment, round_index)
    except AmendmentError:
      continue
    behind = [
      amendment_lib.Support(hotkey, signatures[hotkey])
      for hotkey in sorted(signatures)
    ]
    adoption = amendment_lib.Adoption(amendment, tuple(behind))
    return adoption
  return None


def check(node: Validator, manifest: manifest_lib.Manifest) -> None:
  """Raises AmendmentError for a proposal that this validator will not vote for.

  It adopts what this release does not allow, or it leaves out for longer than
  a round what more than half of the stake supports.
  """
  r, adoption = manifest.round, manifest.adoption
  assert node.role.collected is not None
  closing = node.role.collected.membership
  if adoption is not None:
    _check_own(node, adoption)
    _check(node, adoption.amendment, r)
    return
  for amendment, since in node.role.supported.items():
    signatures = [*node.role.supports.get(amendment, ())]
    if since >= r or not closing.is_majority(signatures, r):
      continue
    try:
      _check(node, amendment, r)
    except AmendmentError:
      continue
    raise AmendmentError(
      f'the manifest of round {r} leaves out an amendment that more than half '
      f'of the stake has supported since round {since}'
    )


def _check_own(node: Validator, adoption: amendment_lib.Adoption) -> None:
  """Raises AmendmentError if an own signature in an adoption was withdrawn."""
  chain = node.chain
  if all(support.hotkey != chain.hotkey for support in adoption.supports):
    return
  run = node.shared_model.run
  own = own_supports(node.objects, run, chain.hotkey, chain.verify)
  if adoption.amendment not in own:
    raise AmendmentError(
      f'{chain.hotkey} has withdrawn its support of the amendment from round '
      f'{adoption.amendment.round} on'
    )


def _check(
  node: Validator, amendment: amendment_lib.Amendment, round_index: int
) -> None:
  """Raises AmendmentError unless a manifest of a round may adopt it.

  A rollback must be to a state whose checkpoint this validator has put into its
  own bucket after a round (targets.py): else nobody might have it in the end.
  """
  amendments_lib.check(
    node.context.config, node.amendments, amendment, round_index
  )
  target = amendments_lib.restored(amendment)
  if target is None:
    return
  if (first := target.round) == node.schedule.first:
    known = node.role.prints.get(first, target.fingerprint)
    is_right = known == target.fingerprint
  else:
    is_right = target in node.role.targets
  if not is_right:
    raise AmendmentError(
      f'the checkpoint of round {target.round} with the fingerprint '
      f'{target.fingerprint} is not in the own bucket'
    )


def supports_of(
  objects: run_storage_lib.RunStorage,
  membership: Membership,
  peer: chain_lib.Peer,
  run: bytes,
  verify: amendment_lib.Verify,
) -> list[amendment_lib.Amendment]:
  """Returns the amendments that a peer supports, as far as can be read."""
  bucket = objects.bucket_at(membership.location(peer.uid))
  if bucket is None:
    return []
  try:
    data = bucket.get(objects.key(_KIND, 0), amendment_lib.MAX_SUPPORT_BYTES)
    return [*amendment_lib.decode_supports(data, run, peer.hotkey, verify)]
  except (store_lib.StoreError, AmendmentError):
    return []
