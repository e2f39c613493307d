"""Checks of a manifest against the chain, the same on all nodes."""

from covenant.protocol import membership as membership_lib
from covenant.protocol import round as round_lib
from covenant.wire import manifest as manifest_lib


def check_entries(
  manifest: manifest_lib.Manifest,
  closing: membership_lib.Membership,
  schedule: round_lib.Schedule,
  most: int,
) -> None:
  """Raises ManifestError unless the chain has all that a manifest lists.

  Such a manifest is void, whoever voted for it: nobody counts. All nodes find
  the same, as they read the same block.

  Args:
    manifest: the manifest.
    closing: the membership at the close of the round's put window.
    schedule: the blocks of the phases.
    most: the most entries, `SharedModel.most_entries`.
  """
  if len(manifest.entries) > most:
    raise manifest_lib.ManifestError(
      f'manifest of round {manifest.round}: expected at most {most} entries, '
      f'got {len(manifest.entries)}'
    )
  opens = schedule.put_opens(manifest.round)
  for entry in manifest.entries:
    peer = closing.peers.get(entry.uid)
    digest = closing.payload(entry.uid, manifest.round, opens)
    if peer is None or peer.hotkey != entry.hotkey or digest != entry.digest:
      raise manifest_lib.ManifestError(
        f'manifest of round {manifest.round}: no miner {entry.hotkey} with '
        f'uid {entry.uid} committed to {entry.digest.hex()[:16]} in its put '
        'window'
      )
  adoption = manifest.adoption
  if adoption is not None and not closing.is_majority(
    [support.hotkey for support in adoption.supports], manifest.round
  ):
    raise manifest_lib.ManifestError(
      f'manifest of round {manifest.round}: its amendment lacks the support of '
      'more than half of the stake'
    )
