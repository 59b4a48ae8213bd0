"""Who is who across cameras: visits of tracks, joined to identities by appearance and by learned travel times."""
