"""An RTSP server of a moving test picture at rtsp://127.0.0.1:PORT/test, until it is killed: `rtsp_server.py PORT`.

Run by the system's Python, which has GStreamer's (Debian: python3-gst-1.0, gir1.2-gst-rtsp-server-1.0); it leaves with
exit code 77 where that, or a plugin, is missing.
"""

import sys

try:
    import gi  # type: ignore[import-not-found,unused-ignore]

    gi.require_version("Gst", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    from gi.repository import GLib, Gst, GstRtspServer  # type: ignore[import-not-found,unused-ignore]
except (ImportError, ValueError):
    sys.exit(77)

Gst.init(None)
if not all(Gst.ElementFactory.find(name) for name in ("videotestsrc", "x264enc", "rtph264pay")):
    sys.exit(77)
server, factory = GstRtspServer.RTSPServer(), GstRtspServer.RTSPMediaFactory()
server.set_address("127.0.0.1")
server.set_service(sys.argv[1])
factory.set_shared(True)
factory.set_launch(
    "( videotestsrc is-live=true pattern=ball ! video/x-raw,width=320,height=240,framerate=25/1 ! videoconvert"
    " ! video/x-raw,format=I420 ! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=12 threads=1"
    " ! rtph264pay name=pay0 pt=96 config-interval=1 )"
)
server.get_mount_points().add_factory("/test", factory)
if not server.attach(None):
    sys.exit("the port is taken")
print("ready", flush=True)
GLib.MainLoop().run()
